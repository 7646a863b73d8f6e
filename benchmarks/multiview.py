"""Benchmark: time of stage 1 in its modes, beside a plain loop over the same weights that runs both passes whole.

    python benchmarks/multiview.py [--config configs/multiview-full.json | --model CHECKPOINT] [--steps 8] [--output REPORT.json]

With `--config` the weights are random, with `--model` (default: the checkpoint in the package) trained. The reference is noised as
in Zero123++ whatever the checkpoint says, since a clean one is read once and there is nothing to compare. Modes: `exact`, the pipeline
as it is; `reuse N`, `reuse_interval=N`; `half guided`, guidance in the first half of the steps only. PSNR is between a
mode's tile and the plain loop's, from the same noise. Text, image and reference latent are encoded once in all of them. `step_seconds`
are those of each denoising step alone: with `reuse N` the first of every N is a whole one, so that two steps tell what any N saves.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw
from texture import peak_memory

from one2345pp import MultiViewTilePipeline, One2345PlusPlusPipeline, default_checkpoint
from one2345pp.models.attention_reference import ReferenceAttention
from one2345pp.training.components import build_components


MODES = {
    "exact": {},
    "reuse 2": {"reuse_interval": 2},
    "reuse 3": {"reuse_interval": 3},
    "reuse 4": {"reuse_interval": 4},
    "half guided": {"guidance_interval": (0.0, 0.5)},
}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    pipe, image = load_pipeline(args), picture()
    draw(pipe, image, args, steps=1)  # warm up
    tiles, step_seconds, seconds = {}, {}, {mode: [] for mode in ("plain", *args.modes)}
    for _ in range(args.repeats):  # in turn, so that what else the machine does hits all of them
        for mode in seconds:
            if mode == "plain":
                tiles[mode], own, steps = draw_plainly(pipe, image, args)
            else:
                tiles[mode], own, steps = draw(pipe, image, args, **MODES[mode])
            seconds[mode].append(own)
            step_seconds[mode] = np.minimum(steps, step_seconds.get(mode, math.inf))
            print(mode, [round(float(step), 2) for step in steps], flush=True)
    rows = []
    for mode, tile in tiles.items():
        error = (tile - tiles["plain"]).square().mean().item()
        psnr = None if error == 0 else round(-10 * np.log10(error), 2)  # None: the same tile
        least = min(seconds[mode])
        rows.append({"mode": mode, "seconds": least, "share": least / min(seconds["plain"]), "psnr": psnr})
        rows[-1]["step_seconds"] = [round(float(step), 3) for step in step_seconds[mode]]
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "torch": torch.__version__,
        "threads": args.threads,
        "steps": args.steps,
        "peak_mib": peak_memory(resource.RUSAGE_SELF),
        "rows": rows,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config of train multiview, for random weights")
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: the checkpoint in the package")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="rounds through all modes; the least time counts")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    return parser.parse_args()


def load_pipeline(args: argparse.Namespace) -> MultiViewTilePipeline:
    if args.config is None:
        pipe = One2345PlusPlusPipeline.from_pretrained(args.model or default_checkpoint()).multiview
    else:
        config = {"seed": 0, **json.loads(args.config.read_text())}
        pipe = MultiViewTilePipeline(**build_components(config), view_size=config["view_size"])
    pipe.register_to_config(clean_reference=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture() -> Image.Image:
    """A red ball with a light, on nothing."""
    image = Image.new("RGBA", (320, 320))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 40, 280, 280), fill=(190, 40, 30, 255))
    draw.ellipse((100, 80, 150, 120), fill=(255, 190, 180, 255))
    return image


def draw(
    pipe: MultiViewTilePipeline, image: Image.Image, args: argparse.Namespace, steps: int | None = None, **options
):
    """Pixels of the tile, how long the call took, and each of its steps."""
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": steps or args.steps, "guidance_scale": 4.0, "output_type": "pt", **options}
    marks: list[float] = []

    def mark(pipe, step, timestep, tensors) -> dict:
        marks.append(time.perf_counter())
        return tensors

    def begin(*_) -> None:
        if not marks:
            marks.append(time.perf_counter())

    first = pipe.unet.register_forward_pre_hook(begin)
    start = time.perf_counter()
    tile = pipe(image, generator=generator, callback_on_step_end=mark, **settings).images
    end = time.perf_counter()
    first.remove()
    return tile, end - start, np.diff(marks)


def draw_plainly(pipe: MultiViewTilePipeline, image: Image.Image, args: argparse.Namespace):
    """The same call, but the UNet runs to its end on the reference, too."""
    with whole_reference_pass():
        return draw(pipe, image, args)


def whole_reference_pass():
    """A context in which the pass over the reference does not end where its last tokens are kept."""
    return patch.object(ReferenceAttention, "keep", lambda passes, name, tokens: passes.tokens.update({name: tokens}))


if __name__ == "__main__":
    main()
