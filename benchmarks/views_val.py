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
import math
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image

from one2345pp import CameraRig, MultiViewTilePipeline, Views
from one2345pp.data.dataset import PreparedDataset
from one2345pp.errors import InputError
from one2345pp.evaluation.baselines import visual_hull
from one2345pp.evaluation.metrics import image_metrics
from one2345pp.geometry.rasterize import rasterize
from one2345pp.geometry.tile import BACKGROUND, composite_on_grey, make_tile, split_tile
from one2345pp.pipelines.multiview.latents import IMAGE_SCALE


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    pipe = harness.load_first_stage(args.model)
    rig = CameraRig.named(args.rig or pipe.config.rig)
    items = examples(args.data, rig, pipe.config.view_size, args.limit)

    start, seeds = time.perf_counter(), range(args.seed, args.seed + args.seeds)
    drawings = [draw(pipe, items, rig, seed, args) for seed in seeds]
    seconds = (time.perf_counter() - start) / len(items) / len(seeds)

    drawn = list(zip(items, drawings[0], strict=True))
    rows = {
        "autoencoder": [compare(decode(pipe, item["truth"]), item["truth"]) for item in items],
        "copy": [compare(Views([item["input"]] * len(rig), rig), item["truth"]) for item in items],
        "generated": [compare(views, item["truth"]) for item, views in drawn],
    }
    tiers = harness.by_tier(rows["generated"], [item["tier"] for item in items])
    report = {
        "settings": {
            "rig": rig.name,
            "steps": args.steps,
            "guidance": args.guidance,
            "seed": args.seed,
            "objects": len(items),
        },
        "seconds": seconds,
        "mean": {name: harness.mean(values) for name, values in rows.items()},
        "tiers": {tier: harness.mean(values) for tier, values in tiers.items()},
        "seeds": between_seeds(drawings, rig) if len(seeds) > 1 else {},
    }
    harness.write_report(report, args.output / "views.json", describe(report))
    shown = range(0, len(items), max(1, len(items) // args.sheet))
    sheet = [[items[i]["input"], *drawings[0][i], *items[i]["truth"]] for i in shown]
    harness.save_sheet(sheet, args.output / "views.png", 96, background=BACKGROUND)
    if len(seeds) > 1:
        sheet = [[items[i]["input"], *one[i]] for i in shown for one in drawings]
        harness.save_sheet(sheet, args.output / "seeds.png", 96, background=BACKGROUND)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, "output", "model", "limit", "seed", "threads")
    parser.add_argument("--data", type=Path, required=True, help="rings of held-out objects")
    parser.add_argument("--rig", choices=CameraRig.names(), help="cameras of the views; default: the checkpoint's")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the checkpoint's")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--batch", type=int, default=16, help="objects drawn at once")
    parser.add_argument("--sheet", type=int, default=24, help="objects on the contact sheet, about: every n-th")
    parser.add_argument("--seeds", type=int, default=1, help="drawings of each object, from --seed on")
    return harness.parse(parser, argv)


def examples(data: Path, rig: CameraRig, size: int, limit: int | None) -> list[dict]:
    """Of the first frame of each of the rig's rings its `tier`, first `input` picture, and true `Views`, `RGBA` of a view's size."""
    prepared = PreparedDataset(data)
    rigs = prepared.meta["rigs"]
    items = (prepared[index] for index in range(len(prepared)))
    rings = [item for item in items if rigs[int(item.get("rig", 0))] == rig.name]
    if not prepared.meta.get("rings") or not rings:
        raise InputError(f"{data}: has no rings of {rig.name}. Make some: one2345pp prepare --rings {rig.name}")
    return [
        {
            "tier": item["tier"],
            "input": picture(item["inputs"][0, 0], size),
            "truth": Views(
                [picture(item["views"][j % 2, j], size) for j in range(len(rig))], rig
            ),  # `prepare.make_ring`
        }
        for item in harness.spread(rings, limit)
    ]


def picture(
    pixels: torch.Tensor,  # [S, S, 4] uint8
    size: int,
) -> Image.Image:
    """Prepared pixels as a picture of this size."""
    premultiplied = Image.fromarray(pixels.numpy()).convert("RGBa")  # colours of transparent pixels do not bleed
    return premultiplied.resize((size, size), Image.Resampling.BICUBIC).convert("RGBA")


def draw(
    pipe: MultiViewTilePipeline, items: list[dict], rig: CameraRig, seed: int, args: argparse.Namespace
) -> list[Views]:
    """Six views (`RGBA`) of every item."""
    drawn = []
    for first in range(0, len(items), args.batch):
        drawn += pipe(
            [item["input"] for item in items[first : first + args.batch]],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator().manual_seed(seed),
            transparent=True,
            rig=rig.name,
        ).views
    return drawn


def decode(pipe: MultiViewTilePipeline, views: Views) -> Views:
    """The views' tile through the autoencoder and back, cut out (`RGBA`)."""
    tile = make_tile([composite_on_grey(view) for view in views])
    tile.putalpha(make_tile([view.getchannel("A") for view in views]))
    pixels = torch.from_numpy(np.array(tile)).movedim(-1, 0)[None, : pipe.vae.config.in_channels]
    with torch.no_grad():
        latents = pipe.vae.encode((pixels / 127.5 - 1) * IMAGE_SCALE).latent_dist.mode()
        decoded = pipe.decode_latents(latents * pipe.vae.config.scaling_factor)
    tile = pipe.image_processor.postprocess(decoded[:, :3], output_type="pil")[0]
    return pipe.cut_out([Views(split_tile(tile), views.rig)], decoded)[0]


def compare(views: Views, truth: Views) -> dict[str, float]:
    """PSNR on grey over whole views, SSIM, IoU of the masks, and how far the masks agree among themselves; all views are `RGBA`."""
    cut, true = (np.stack([np.asarray(view) for view in six]) for six in (views, truth))
    figures, pairs = image_metrics(cut, true), list(zip(views, truth, strict=True))
    return {
        "psnr_grey": float(np.mean([psnr_on_grey(*pair) for pair in pairs])),
        "psnr": figures["psnr"],
        "ssim": figures["ssim"],
        "mask_iou": figures["mask_iou"],
        "front_iou": float(np.mean([mask_iou(*pairs[i]) for i in (0, -1)])),
        "hull_agreement": hull_agreement(cut[..., 3] / 255, views.rig),
    }


def psnr_on_grey(a: Image.Image, b: Image.Image) -> float:
    return harness.psnr(*(np.asarray(composite_on_grey(view)) / 255 for view in (a, b)))


def mask_iou(a: Image.Image, b: Image.Image) -> float:
    return harness.iou(harness.mask(a), harness.mask(b))


def hull_agreement(
    masks: np.ndarray,  # [V, S, S] in [0, 1]
    rig: CameraRig,
) -> float:
    """IoU of the masks and those of their own visual hull, mean over the views."""
    try:
        hull = visual_hull(masks, rig, resolution=48)
    except InputError:  # the masks have nothing in common
        return 0.0
    cast = rasterize(hull, rig, masks.shape[-1]).mask
    return float(np.mean([harness.iou(a, b >= 0.5) for a, b in zip(cast, masks, strict=True)]))


def between_seeds(drawings: list[list[Views]], rig: CameraRig) -> dict[str, dict[str, float]]:
    """PSNR on grey and mask IoU between two drawings of one object, mean over pairs and objects, for each view by its azimuth."""
    pairs = [pair for one in zip(*drawings, strict=True) for pair in itertools.combinations(one, 2)]
    figures = {}
    for view in range(len(rig)):
        azimuth = math.degrees(math.atan2(*rig.positions[view, [0, 2]].tolist())) % 360
        same = [(a[view], b[view]) for a, b in pairs]
        rows = [{"psnr_grey": psnr_on_grey(*two), "mask_iou": mask_iou(*two)} for two in same]
        figures[f"{azimuth:.0f}"] = harness.mean(rows)
    return figures


def describe(report: dict) -> str:
    """The report for people: means of each kind of views, of what was generated by tier, and between seeds."""
    rows = report["mean"] | {f"generated, {tier}": means for tier, means in report["tiers"].items()}
    columns = list(report["mean"]["generated"])
    text = harness.table(["views", *columns], [[name, *means.values()] for name, means in rows.items()])
    text += f"\n{report['settings']}, {report['seconds']:.2f} s an object\n"
    if report["seeds"]:
        heading = ["azimuth", "PSNR between seeds", "mask IoU between seeds"]
        text += "\n" + harness.table(heading, [[name, *means.values()] for name, means in report["seeds"].items()])
    return text


if __name__ == "__main__":
    main()
