"""Benchmark: where the volume stage loses quality on held-out objects, step by step.

    python benchmarks/volume_val.py --data PREPARED --output OUT [--model CHECKPOINT] [--drawn]

`PREPARED` is what `one2345pp prepare --frames 1` made of held-out objects. The views are true ones, or with `--drawn` those that the
checkpoint's first stage draws of the first input picture, once and without the picture's guide. Columns of the table:

- `iou`, `precision`, `recall`: of the coarse shell occupancy, at its own resolution.
- `distance`, `color`: error of the sparse diffusion on the true support, in truncation distances and dB.
- `f_true`, `f_predicted`: F-score at 0.02 and 0.05 of the longest side between the mesh of the true volume and that of the stage
  on the true and on the predicted support; what `f_predicted` lacks of `f_true` is the occupancy's share of the loss.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor

from one2345pp import One2345PlusPlusPipeline, SparseVolume, Views
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.prepare import RIGS
from one2345pp.errors import InputError
from one2345pp.evaluation.metrics import SurfacePoints, surface_metrics
from one2345pp.geometry.extract import volume_to_mesh
from one2345pp.training.occupancy import OccupancySettings, shell_occupancy


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    pipe = harness.load_chain(args.model)
    pipe.guide = None  # the networks alone, on one drawing
    prepared = PreparedDataset(args.data)
    start, rows, tiers, objects = time.perf_counter(), [], [], []
    for index in harness.spread(range(len(prepared)), args.limit):
        item = prepared[index]
        rows.append(measure(pipe, item, prepared.truncation, args))
        tiers.append(item["tier"])
        objects.append({"name": item["name"], "tier": item["tier"], **rows[-1]})
        print(item["name"], flush=True)
    report = {
        "settings": {
            "rig": args.rig,
            "steps": [args.occupancy_steps, args.sparse_steps],
            "drawn": args.drawn,
            "seed": args.seed,
            "points": args.points,
        },
        "seconds": (time.perf_counter() - start) / len(rows),
        "objects": objects,
    }
    groups = {"all": rows} | harness.by_tier(rows, tiers)
    lines = [[name, len(group), *harness.mean(group).values()] for name, group in groups.items()]
    text = harness.table(["objects", "number", *rows[0]], lines)
    text += f"\n{report['settings']}, {report['seconds']:.1f} s an object\n"
    harness.write_report(report, args.output / "volume.json", text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, "output", "model", "limit", "seed", "threads")
    parser.add_argument("--data", type=Path, required=True, help="frames of held-out objects")
    parser.add_argument("--rig", choices=RIGS, default=RIGS[0], help="cameras of the true views")
    parser.add_argument("--drawn", action="store_true", help="views that the first stage draws")
    parser.add_argument("--occupancy-steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--sparse-steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--points", type=int, default=20_000, help="samples of each surface")
    return harness.parse(parser, argv)


def measure(pipe: One2345PlusPlusPipeline, item: dict, truncation: float, args: argparse.Namespace) -> dict[str, float]:
    """All columns of one object; F-scores are 0 where there is no surface."""
    sdf, coords = item["sdf"].float() / 127, item["coords"]  # in truncation distances
    colors = torch.zeros(*sdf.shape, 3)
    cells = coords.unbind(1)
    colors[cells] = item["colors"].float() / 255
    true_mesh = volume_to_mesh(SparseVolume(coords, sdf[cells] * truncation, colors[cells], len(sdf), truncation))
    shell = shell_occupancy(sdf[None], OccupancySettings().occupancy_threshold / (truncation * len(sdf)))
    support = shell[None].float() * 2 - 1
    stage, (picture, views) = pipe.drawn_volume if args.drawn else pipe.volume, given(pipe, item, args)
    if (side := stage.occupancy_unet.config.sample_size) != shell.shape[-1]:
        raise InputError(f"{args.data}: was prepared at {len(sdf)}^3, expected {2 * side}^3, as the checkpoint draws.")

    (occupancy, *_), on_predicted = reconstruct(pipe, views, picture, args)
    (_, sample, *_), on_true = reconstruct(pipe, views, picture, args, support)
    occupied, truth = (occupancy[:, 0] > stage.config.occupancy_level).numpy(), shell.numpy()
    both = (occupied & truth).sum()
    cells, sample = stage.subdivide(support).coords[:, 1:].unbind(1), sample.clamp(-1, 1)
    known = sdf[cells].abs() < 0.995
    return {
        "iou": harness.iou(occupied, truth),
        "precision": float(both / max(occupied.sum(), 1)),
        "recall": float(both / max(truth.sum(), 1)),
        "distance": (sample[:, 0] - sdf[cells]).abs().mean().item(),
        "color": harness.psnr((sample[known, 1:] + 1) / 2, colors[cells][known]),
        **f_scores("f_true", on_true, true_mesh, args.points),
        **f_scores("f_predicted", on_predicted, true_mesh, args.points),
    }


def given(pipe: One2345PlusPlusPipeline, item: dict, args: argparse.Namespace) -> tuple[Image.Image, Views]:
    """The first input picture, and the views."""
    picture = Image.fromarray(item["inputs"][0].numpy())
    if args.drawn:
        return picture, pipe.multiview.draw(picture, generator=torch.Generator().manual_seed(args.seed))
    first = 6 * RIGS.index(args.rig)
    return picture, Views([Image.fromarray(view.numpy()) for view in item["views"][first : first + 6]], args.rig)


def reconstruct(
    pipe: One2345PlusPlusPipeline,
    views: Views,
    picture: Image.Image,
    args: argparse.Namespace,
    support: Tensor | None = None,  # [1, 1, x, y, z], -1 or 1
) -> tuple[list[Tensor], trimesh.Trimesh | None]:
    """What each diffusion drew, `[1, 1, x, y, z]` and `[N, 4]`, and the mesh, `None` where there is no surface.

    With a support the sparse diffusion sees that, whatever the first one drew.
    """
    drawn: list[Tensor] = []

    def end_step(stage, step, timestep, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = tensors["latents"]
        if not drawn or drawn[-1].shape != latents.shape:  # the first step of a diffusion
            drawn.append(latents)
        drawn[-1] = latents
        return tensors if support is None or len(drawn) > 1 else {"latents": support.to(latents)}

    try:
        out = pipe.reconstruct(
            views,
            image=picture,
            background="none",
            drawn=args.drawn,
            num_occupancy_steps=args.occupancy_steps if support is None else 1,
            num_sparse_steps=args.sparse_steps,
            refine=False,
            generator=torch.Generator().manual_seed(args.seed),
            callback_on_step_end=end_step,
        )
    except InputError:  # no surface
        return drawn, None
    return drawn, out.meshes[0]


def f_scores(name: str, mesh: trimesh.Trimesh | None, truth: trimesh.Trimesh, points: int) -> dict[str, float]:
    """F-scores at 0.02 and 0.05 of the truth's longest side."""
    thresholds = (0.02, 0.05)
    if mesh is None:
        return {f"{name}@{t:g}": 0.0 for t in thresholds}
    unit = np.diag([1 / np.ptp(truth.bounds, axis=0).max()] * 3 + [1.0])
    a, b = (SurfacePoints.from_mesh(m, points).transformed(unit) for m in (mesh, truth))
    figures = surface_metrics(a, b, thresholds)
    return {f"{name}@{t:g}": figures[f"f_score@{t:g}"] for t in thresholds}


if __name__ == "__main__":
    main()
