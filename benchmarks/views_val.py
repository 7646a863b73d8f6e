"""Benchmark: how good the first stage's six views of held-out objects are, and where the loss is.

    python benchmarks/views_val.py --data RINGS --output OUT [--model CHECKPOINT]

`RINGS` is what `one2345pp prepare --rings zero123plus-v1.2` made of held-out objects; of each ring of the rig (`--rig`) the first
frame and its first input picture are used. Rows of the table: `autoencoder` (the true tile through the autoencoder and back, the
ceiling), `copy` (the input picture six times, the floor), `generated`. `hull_agreement` is the mask IoU of the six masks and those
of their own visual hull. With `--seeds N` each object is drawn N times, and a second table says how far the drawings of one object
are from each other, view by view: the input shows what the views at azimuths 30 and 330 see, and says little of those at 150 and
210.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from one2345pp import MultiViewTilePipeline, One2345PlusPlusPipeline, default_checkpoint
from one2345pp.data.dataset import PreparedDataset
from one2345pp.errors import InputError
from one2345pp.evaluation.baselines import visual_hull
from one2345pp.evaluation.metrics import image_metrics
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.rasterize import rasterize
from one2345pp.geometry.render import contact_sheet
from one2345pp.pipelines.tiles import composite_on_grey
from one2345pp.training.tiles import Frames, to_pil, to_pixels, to_tile


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    pipe = load(args.model)
    prepared = PreparedDataset(args.data)
    args.rig = args.rig or pipe.config.rig
    rig = CameraRig.named(args.rig)
    frames = Frames(prepared, {"rigs": prepared.meta["rigs"], "view_size": pipe.config.view_size})
    indices = [i for i in range(len(prepared)) if frames.known[frames.labels(prepared[i])[0]] == args.rig]
    if args.limit and args.limit < len(indices):
        indices = [indices[i * len(indices) // args.limit] for i in range(args.limit)]
    items = [example(prepared[i], frames) for i in indices]

    start = time.perf_counter()
    seeds = range(args.seed, args.seed + args.seeds)
    drawings = [draw(pipe, items, seed, args) for seed in seeds]
    seconds = (time.perf_counter() - start) / len(items) / len(seeds)
    drawn = drawings[0]

    rows: dict[str, list[dict[str, float]]] = {"autoencoder": [], "copy": [], "generated": []}
    for item, views in zip(items, drawn, strict=True):
        rows["autoencoder"].append(compare(decode(pipe, item["tile"]), item["truth"], rig))
        rows["copy"].append(compare([item["input"]] * len(rig), item["truth"], rig))
        rows["generated"].append(compare(views, item["truth"], rig))
    report = {
        "settings": {
            "rig": args.rig,
            "steps": args.steps,
            "guidance": args.guidance,
            "seed": args.seed,
            "objects": len(items),
        },
        "seconds": seconds,
        "mean": {name: mean(values) for name, values in rows.items()},
        "tiers": {
            tier: mean([v for v, item in zip(rows["generated"], items, strict=True) if item["tier"] == tier])
            for tier in sorted({item["tier"] for item in items})
        },
    }
    if len(seeds) > 1:
        report["seeds"] = between_seeds(drawings, rig)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "views.json").write_text(json.dumps(report, indent=1) + "\n")
    write_table(report, args.output / "views.md")
    step = max(1, len(items) // args.sheet)
    sheet = []
    for item, views in list(zip(items, drawn, strict=True))[::step]:
        sheet.append([item["input"], *views, *item["truth"]])
    contact_sheet(sheet, 96, background=(127, 127, 127)).save(args.output / "views.png")
    if len(seeds) > 1:
        rows = [[items[i]["input"], *drawn[i]] for i in range(0, len(items), step) for drawn in drawings]
        contact_sheet(rows, 96, background=(127, 127, 127)).save(args.output / "seeds.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rings of held-out objects")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default=str(default_checkpoint()), help="a first stage, or a whole chain")
    parser.add_argument("--rig", choices=CameraRig.names(), help="cameras of the views; default: the checkpoint's")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the checkpoint's")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--limit", type=int, help="only so many objects, spread over the set")
    parser.add_argument("--batch", type=int, default=16, help="objects drawn at once")
    parser.add_argument("--sheet", type=int, default=24, help="objects on the contact sheet, about: every n-th")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="drawings of each object, from --seed on")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def load(model: str) -> MultiViewTilePipeline:
    index = Path(model) / "model_index.json"
    whole = index.exists() and "occupancy_unet" in json.loads(index.read_text())
    pipe = (
        One2345PlusPlusPipeline.from_pretrained(model).multiview
        if whole
        else MultiViewTilePipeline.from_pretrained(model)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: MultiViewTilePipeline, items: list[dict], seed: int, args: argparse.Namespace
) -> list[list[Image.Image]]:
    """Six views (`RGBA`) of every item."""
    drawn = []
    for first in range(0, len(items), args.batch):
        drawn += pipe(
            [item["input"] for item in items[first : first + args.batch]],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator().manual_seed(seed),
            transparent=True,
            rig=args.rig,
        ).views
    return drawn


def between_seeds(drawings: list[list[list[Image.Image]]], rig: CameraRig) -> dict[str, dict[str, float]]:
    """PSNR on grey and mask IoU between two drawings of one object, mean over pairs and objects, for each view."""
    figures = {}
    for view in range(len(rig)):
        pairs = []
        for one, other in itertools.combinations(drawings, 2):
            for a, b in zip(one, other, strict=True):
                colors = [np.asarray(composite_on_grey(six[view]), np.float64) / 255 for six in (a, b)]
                masks = [np.asarray(six[view])[..., 3] >= 128 for six in (a, b)]
                error = max(((colors[0] - colors[1]) ** 2).mean(), 1e-6)
                pairs.append({"psnr_grey": -10 * math.log10(error), "mask_iou": mask_iou(*masks)})
        azimuth = math.degrees(math.atan2(*rig.positions[view, [0, 2]].tolist())) % 360
        figures[f"{azimuth:.0f}"] = mean(pairs)
    return figures


def example(item: dict, frames: Frames) -> dict:
    """Input picture, true tile (uint8 tensor, colours on grey and masks) and true RGBA views of an item's first frame."""
    pictures = frames.pictures(item)
    views = pictures["views"][frames.views[0]]
    return {
        "tier": item["tier"],
        "input": to_pil(pictures["inputs"][frames.inputs[0, 0]]),
        "tile": to_tile(views),
        "truth": [to_pil(view) for view in views],
    }


def decode(pipe: MultiViewTilePipeline, tile: torch.Tensor) -> list[Image.Image]:
    """The tile through the autoencoder and back, as views (`RGBA`)."""
    pixels = to_pixels(tile[None, : pipe.vae.config.in_channels])
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        decoded = pipe.decode_latents(latents)
    images = pipe.image_processor.postprocess(decoded[:, :3], output_type="pil")
    return pipe.cut_out(pipe.split_views(images), decoded)[0]


def compare(views: list[Image.Image], truths: list[Image.Image], rig: CameraRig) -> dict[str, float]:
    """PSNR on grey over whole views, SSIM, IoU of the masks, and how far the masks agree among themselves; all views are RGBA."""
    cut, truth = (np.stack([np.asarray(view) for view in six]) for six in (views, truths))
    on_grey = [np.stack([np.asarray(composite_on_grey(v), np.float64) for v in six]) / 255 for six in (views, truths)]
    error = ((on_grey[0] - on_grey[1]) ** 2).mean((1, 2, 3))
    figures = image_metrics(cut, truth)
    ious = [mask_iou(a[..., 3] >= 128, b[..., 3] >= 128) for a, b in zip(cut, truth, strict=True)]
    return {
        "psnr_grey": float(np.mean(-10 * np.log10(np.maximum(error, 1e-6)))),
        "psnr": figures["psnr"],
        "ssim": figures["ssim"],
        "mask_iou": figures["mask_iou"],
        "front_iou": (ious[0] + ious[-1]) / 2,
        "hull_agreement": hull_agreement(cut[..., 3] / 255, rig),
    }


def hull_agreement(masks: np.ndarray, rig: CameraRig) -> float:
    try:
        hull = visual_hull(masks, rig, resolution=48)
    except InputError:  # the masks have nothing in common
        return 0.0
    cast = rasterize(hull, rig, masks.shape[-1]).mask
    return float(np.mean([mask_iou(a, b >= 0.5) for a, b in zip(cast, masks, strict=True)]))


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def mean(values: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([value[key] for value in values])) for key in values[0]}


def write_table(report: dict, path: Path) -> None:
    columns = list(report["mean"]["generated"])
    rows = {**report["mean"], **{f"generated, {tier}": means for tier, means in report["tiers"].items()}}
    lines = ["| views | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    lines += [f"| {name} | " + " | ".join(f"{means[c]:.3f}" for c in columns) + " |" for name, means in rows.items()]
    text = "\n".join(lines) + f"\n\n{report['settings']}, {report['seconds']:.2f} s an object\n"
    if "seeds" in report:
        text += "\n| azimuth | PSNR between seeds | mask IoU between seeds |\n| --- | --- | --- |\n"
        for azimuth, means in report["seeds"].items():
            text += f"| {azimuth} | {means['psnr_grey']:.1f} | {means['mask_iou']:.3f} |\n"
    path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
