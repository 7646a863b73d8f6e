"""Benchmark: where the volume stage loses quality on held-out objects, step by step.

    python benchmarks/volume_val.py --data PREPARED --output OUT [--model CHECKPOINT] [--drawn]

`PREPARED` is what `one2345pp prepare --frames 1` made of held-out objects. The views are true ones, or with `--drawn` those that the
checkpoint's first stage draws of the first input picture. Columns of the table:

- `iou`, `precision`, `recall`: of the coarse shell occupancy, at its own resolution.
- `distance`, `color`: error of the fine stage on the true support, in truncation distances and dB.
- `f_true`, `f_predicted`: F-score at 0.02 and 0.05 of the longest side between the mesh of the true volume and that of the fine
  stage on the true and on the predicted support; what `f_predicted` lacks of `f_true` is the occupancy's share of the loss.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor

from one2345pp import One2345PlusPlusPipeline, default_checkpoint
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.prepare import RIGS
from one2345pp.errors import InputError
from one2345pp.evaluation.metrics import SurfacePoints, surface_metrics
from one2345pp.geometry.extract import volume_to_mesh
from one2345pp.geometry.volume import SparseVolume
from one2345pp.models.sparse import SparseGrid
from one2345pp.training.occupancy import shell_occupancy
from one2345pp.training.sparse import subdivide
from one2345pp.training.volume import DEFAULTS as VOLUME_DEFAULTS


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    pipe = One2345PlusPlusPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    prepared = PreparedDataset(args.data)
    count = min(args.limit or len(prepared), len(prepared))
    start, rows = time.perf_counter(), []
    for index in [i * len(prepared) // count for i in range(count)]:
        item = prepared[index]
        with torch.no_grad():
            rows.append({"name": item["name"], "tier": item["tier"], **measure(pipe, item, prepared, args)})
    report = {
        "settings": {
            "rig": args.rig,
            "steps": [args.occupancy_steps, args.sparse_steps],
            "drawn": args.drawn,
            "seed": args.seed,
            "points": args.points,
        },
        "seconds": (time.perf_counter() - start) / count,
        "objects": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "volume.json").write_text(json.dumps(report, indent=1) + "\n")
    write_table(rows, report, args.output / "volume.md")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="frames of held-out objects")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default=str(default_checkpoint()))
    parser.add_argument("--rig", choices=RIGS, default=RIGS[0], help="cameras of the true views")
    parser.add_argument("--drawn", action="store_true", help="views that the first stage draws")
    parser.add_argument("--occupancy-steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--sparse-steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--limit", type=int, help="only so many objects, spread over the set")
    parser.add_argument("--points", type=int, default=20_000, help="samples of each surface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def measure(pipe: One2345PlusPlusPipeline, item: dict, prepared: PreparedDataset, args) -> dict[str, float]:
    """All columns of one object; F-scores are 0 where there is no surface."""
    volume, generator = pipe.drawn_volume if args.drawn else pipe.volume, torch.Generator().manual_seed(args.seed)
    sparse_steps = args.sparse_steps or volume.config.default_num_sparse_steps
    picture = Image.fromarray(item["inputs"][0].numpy())
    if args.drawn:
        views, rig = pipe.multiview(picture, generator=generator, transparent=True).views[0], pipe.rig
    else:
        first = 6 * RIGS.index(args.rig)
        views = [Image.fromarray(view.numpy()) for view in item["views"][first : first + 6]]
        rig = args.rig
    views, rigs, images, _ = volume.check_inputs([views], rig, picture, None, "mesh", (1, 1), [])
    vector = volume.encode_image(images, 1)

    sdf, truncation = item["sdf"].float() / 127, prepared.truncation
    cells = truncation * prepared.meta["resolution"]
    truth = shell_occupancy(sdf[None], VOLUME_DEFAULTS["occupancy_threshold"] / cells)
    call = {"output_type": "latent", "generator": generator, "num_occupancy_steps": args.occupancy_steps}
    drawn = volume(views[0], cameras=rig, image=picture, **call).volumes
    occupied = drawn[:, 0] > volume.config.occupancy_level

    colors = torch.zeros(*sdf.shape, 3)
    colors[item["coords"].unbind(1)] = item["colors"].float() / 255
    true_mesh = volume_to_mesh(
        SparseVolume(item["coords"], *at(item["coords"], sdf * truncation, colors), len(sdf), truncation)
    )

    def fine(grid: SparseGrid) -> tuple[Tensor, SparseVolume]:
        pictures = volume.prepare_views(views, rigs, volume.sparse_condition)
        sample = volume.denoise_sparse(grid, pictures, vector, sparse_steps, generator)
        return sample, volume.to_volumes(grid, sample)[0]

    grid = subdivide(truth)
    sample, on_truth = fine(grid)
    true_sdf, true_colors = at(grid.coords[:, 1:], sdf, colors)
    known = true_sdf.abs() < 0.995
    square = ((sample[known, 1:] + 1) / 2 - true_colors[known]).square().mean()
    both = (occupied & truth).sum().item()
    return {
        "iou": both / max((occupied | truth).sum().item(), 1),
        "precision": both / max(occupied.sum().item(), 1),
        "recall": both / max(truth.sum().item(), 1),
        "distance": (sample[:, 0].clamp(-1, 1) - true_sdf).abs().mean().item(),
        "color": -10 * square.clamp(min=1e-6).log10().item(),
        **f_scores("f_true", true_mesh, on_truth, args.points),
        **f_scores("f_predicted", true_mesh, fine(subdivide(occupied))[1] if occupied.any() else None, args.points),
    }


def at(cells: Tensor, *grids: Tensor) -> tuple[Tensor, ...]:
    """Values of dense grids at cells `[N, 3]`."""
    return tuple(grid[cells.unbind(1)] for grid in grids)


def f_scores(name: str, truth: trimesh.Trimesh, volume: SparseVolume | None, points: int) -> dict[str, float]:
    """F-scores at 0.02 and 0.05 of the truth's longest side."""
    keys = ("f_score@0.02", "f_score@0.05")
    try:
        mesh = None if volume is None else volume_to_mesh(volume)
    except InputError:  # no surface
        mesh = None
    if mesh is None:
        return {key.replace("f_score", name): 0.0 for key in keys}
    unit = np.eye(4)
    unit[:3, :3] /= np.ptp(truth.bounds, axis=0).max()
    a, b = (SurfacePoints.from_mesh(m, points).transformed(unit) for m in (mesh, truth))
    figures = surface_metrics(a, b)
    return {key.replace("f_score", name): figures[key] for key in keys}


def write_table(rows: list[dict], report: dict, path: Path) -> None:
    columns = [key for key in rows[0] if key not in ("name", "tier")]
    groups = {"all": rows} | {
        tier: [r for r in rows if r["tier"] == tier] for tier in sorted({r["tier"] for r in rows})
    }
    lines = ["| objects | number | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 2)]
    for name, group in groups.items():
        numbers = [f"{np.mean([row[column] for row in group]):.3f}" for column in columns]
        lines.append(f"| {name} | {len(group)} | " + " | ".join(numbers) + " |")
    text = "\n".join(lines) + f"\n\n{report['settings']}, {report['seconds']:.1f} s an object\n"
    path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
