"""Benchmark: time of stage 1 with guidance in all steps, and in the first half of them.

    python benchmarks/multiview.py [--config configs/multiview-full.json | --model CHECKPOINT] [--steps 8] [--output REPORT.json]

With `--config` the weights are random, with `--model` trained. The reference is noised as in Zero123++ whatever the checkpoint says,
so every step reads it anew; a clean one is read once. PSNR is between a mode's tile and that of the first mode, from the same noise.
`step_seconds` are those of each denoising step alone, without encoding the text, image and reference, and decoding the tile.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image, ImageDraw

from one2345pp import MultiViewTilePipeline
from one2345pp.training.components import build_components


MODES = {"guided": (0.0, 1.0), "half guided": (0.0, 0.5)}  # shares of the steps
GUIDANCE = 4.0
SETTINGS = ("view_size", "rig", "rigs", "tile_positions")  # of the pipeline, in a config


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, "model", "threads", "report")
    parser.add_argument("--config", type=Path, help="config of train multiview, for random weights")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1, help="rounds through all modes; the least time counts")
    args = harness.parse(parser, argv)
    pipe, image = load_pipeline(args), picture()
    draw(pipe, image, steps=1)  # warm up
    tiles, step_seconds, seconds = {}, {}, {mode: math.inf for mode in MODES}
    for _ in range(args.repeats):  # in turn, so that what else the machine does hits all of them
        for mode, interval in MODES.items():
            tiles[mode], own, steps = draw(pipe, image, args.steps, interval)
            seconds[mode] = min(own, seconds[mode])
            step_seconds[mode] = np.minimum(steps, step_seconds.get(mode, math.inf))
            print(f"{mode}: {own:.2f} s", flush=True)
    first = next(iter(MODES))
    rows = [
        {
            "mode": mode,
            "seconds": seconds[mode],
            "share": seconds[mode] / seconds[first],
            "psnr": None if mode == first else harness.psnr(tile, tiles[first]),
            "step_seconds": [round(float(step), 3) for step in step_seconds[mode]],
        }
        for mode, tile in tiles.items()
    ]
    settings = {"torch": torch.__version__, "threads": args.threads, "steps": args.steps}
    harness.write_report(settings | {"peak_mib": harness.peak_memory(), "rows": rows}, args.output)


def load_pipeline(args: argparse.Namespace) -> MultiViewTilePipeline:
    if args.config is None:
        pipe = harness.load_first_stage(args.model)
    else:
        config = json.loads(args.config.read_text())
        parts = build_components(config["components"], config["view_size"], seed=0)
        settings = {name: config[name] for name in SETTINGS if name in config}
        pipe = MultiViewTilePipeline(**parts, **settings)
        pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(clean_reference=False)
    return pipe


def picture() -> Image.Image:
    """A red ball with a light, on nothing."""
    image = Image.new("RGBA", (320, 320))
    brush = ImageDraw.Draw(image)
    brush.ellipse((40, 40, 280, 280), fill=(190, 40, 30, 255))
    brush.ellipse((100, 80, 150, 120), fill=(255, 190, 180, 255))
    return image


def draw(
    pipe: MultiViewTilePipeline, image: Image.Image, steps: int, interval: tuple[float, float] = (0.0, 1.0)
) -> tuple[np.ndarray, float, np.ndarray]:
    """Pixels of the tile, seconds of the call, and of each of its steps."""
    marks: list[float] = []

    def mark(*_) -> None:
        marks.append(time.perf_counter())

    def end_step(pipe, step, timestep, tensors: dict) -> dict:
        mark()
        return tensors

    def begin(*_) -> None:
        if not marks:  # the first pass of the first step
            mark()

    hook = pipe.unet.register_forward_pre_hook(begin)
    start = time.perf_counter()
    tile = pipe(
        image,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        guidance_interval=interval,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        callback_on_step_end=end_step,
    ).images
    end = time.perf_counter()
    hook.remove()
    return tile, end - start, np.diff(marks)


if __name__ == "__main__":
    main()
