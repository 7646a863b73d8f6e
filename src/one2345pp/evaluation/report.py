"""Evaluation of folders of meshes: pairing files, measuring pairs in parallel, JSON and Markdown reports.

What is measured lives in `metrics`, how meshes are aligned in `align`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import trimesh

from ..errors import InputError
from ..geometry.mesh import load_mesh, normalize_to_sphere
from ..geometry.render import orbit, render
from .align import align_yaw_icp
from .metrics import DEFINITIONS, THRESHOLDS, SurfacePoints, handles, image_metrics, surface_metrics


SUFFIXES = (".glb", ".obj", ".ply", ".stl")
ALIGNMENTS = {
    "none": "both meshes as they stand",
    "yaw-icp": "starts as they stand and at 24 yaws about +Y with centred boxes and equal longest sides, the best 8 by ICP "
    "with rotation, scale and shift (pairs of both directions), best inlier ratio at 0.05 kept",
}


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on besides the meshes; part of the report.

    Args:
        points: Samples of each outer surface.
        views: Cameras of the ring that renders are compared from, elevation 15 degrees; 0 for geometry only.
        image_size: Pixels along a side of the renders.
        alignments: Keys of `ALIGNMENTS`; each gives its own set of numbers.
        seed: Seed of the samples of the truth; those of the prediction use `seed + 1`, so that equal meshes score sampling noise.
        thresholds: Distances of the F-scores, in longest bounding box sides of the truth.
        normalize_gt: Move the truth into the frame in which meshes leave the package (box centred on the origin, farthest
            vertex at 0.5) before anything else. Predictions are never normalised.
    """

    points: int = 100_000
    views: int = 12
    image_size: int = 160
    alignments: tuple[str, ...] = tuple(ALIGNMENTS)
    seed: int = 0
    thresholds: tuple[float, ...] = THRESHOLDS
    normalize_gt: bool = True

    def __post_init__(self):
        for name in self.alignments:
            if name not in ALIGNMENTS:
                raise InputError(f"alignments: got {name!r}, expected some of {', '.join(ALIGNMENTS)}.")
        if not self.alignments:
            raise InputError(f"alignments: is empty, expected some of {', '.join(ALIGNMENTS)}.")
        if self.points < 1 or self.views < 0 or self.image_size < 1:
            raise InputError("points and image_size must be at least 1, views at least 0.")


def evaluate(
    pred: str | Path,
    gt: str | Path,
    output: str | Path | None = None,
    *,
    groups: str | Path | None = None,
    workers: int = 1,
    callback_on_object_end: Callable[[int, int, str], None] | None = None,
    **settings,
) -> dict:
    """Compare predicted meshes with true ones, paired by file stem.

    Args:
        pred: Folder of predictions (GLB, OBJ, PLY, STL).
        gt: Folder of truths.
        output: A `.json` file (a `.md` is written beside it), or a folder for `report.json` and `report.md`. `None` writes nothing.
        groups: CSV with the columns `name` and `tier`; adds means for each tier.
        workers: Processes. More than one needs a main module that can be imported again.
        callback_on_object_end: Called with the pairs done, all pairs, and the name.
        settings: Fields of `Settings`.

    Returns:
        The report as written, and its readable form under `"text"`. Objects without a partner and files that cannot be measured
        are listed and counted.

    Raises:
        InputError: If a folder is missing or holds one name twice, no names pair up, or no pair can be measured.
    """
    chosen = Settings(**settings)
    preds, truths = _find_meshes(Path(pred)), _find_meshes(Path(gt))
    tiers = _read_groups(Path(groups)) if groups is not None else {}
    names = sorted(preds.keys() & truths.keys())
    if not names:
        raise InputError(f"{pred}: none of its {len(preds)} meshes has the name of one of the {len(truths)} in {gt}.")
    measured, failed = {}, {}
    jobs = [(name, preds[name], truths[name]) for name in names]
    for done, (name, result) in enumerate(_measure(jobs, chosen, workers), 1):
        if isinstance(result, str):
            failed[name] = result
        else:
            measured[name] = result
        if callback_on_object_end is not None:
            callback_on_object_end(done, len(jobs), name)
    if not measured:
        raise InputError(f"{pred}: none of its {len(names)} pairs can be measured. {names[0]}: {failed[names[0]]}")
    units = "distances are in longest bounding box sides of the truth, for both meshes"
    report = {
        "settings": asdict(chosen) | {"units": units},
        "definitions": DEFINITIONS | {f"alignment {name}": ALIGNMENTS[name] for name in chosen.alignments},
        "counts": {"truths": len(truths), "predictions": len(preds), "pairs": len(names), "measured": len(measured)},
        "missing_predictions": sorted(truths.keys() - preds.keys()),
        "missing_truths": sorted(preds.keys() - truths.keys()),
        "failed": failed,
        "summary": {a: _summary([m[a] for m in measured.values()]) for a in chosen.alignments},
        "groups": _by_group(measured, tiers, chosen.alignments) if tiers else {},
        "objects": measured,
    }
    text = markdown(report)
    if output is not None:
        _write(Path(output), report, text)
    return report | {"text": text}


def evaluate_pair(pred: trimesh.Trimesh, truth: trimesh.Trimesh, settings: Settings) -> dict[str, dict[str, float]]:
    """All metrics of one pair for each alignment."""
    truth = normalize_to_sphere(truth) if settings.normalize_gt else truth
    unit = np.diag([1 / np.ptp(truth.bounds, axis=0).max()] * 3 + [1.0])  # world to longest sides of the truth
    true_points = SurfacePoints.from_mesh(truth, settings.points, settings.seed).transformed(unit)
    pred_points = SurfacePoints.from_mesh(pred, settings.points, settings.seed + 1).transformed(unit)
    rig = orbit(settings.views) if settings.views else None
    # flat colours: light would add a difference of normals to that of colours
    draw = partial(render, rig=rig, size=settings.image_size, supersample=1, shading="none")
    true_views = draw(truth) if rig else None
    results, through = {}, handles(pred)
    for name in settings.alignments:
        matrix = np.eye(4) if name == "none" else align_yaw_icp(pred_points, true_points).matrix
        metrics = surface_metrics(pred_points.transformed(matrix), true_points, settings.thresholds)
        metrics["handles"] = through
        if rig:
            moved = pred.copy().apply_transform(np.linalg.inv(unit) @ matrix @ unit)
            metrics |= image_metrics(draw(moved), true_views)
        results[name] = {key: round(value, 6) for key, value in metrics.items()}
    return results


def markdown(report: dict) -> str:
    """The readable form of a report."""
    counts, settings = report["counts"], report["settings"]
    lines = [
        "# Evaluation",
        "",
        f"{counts['measured']} of {counts['truths']} true meshes measured: {len(report['missing_predictions'])} without a prediction, "
        f"{len(report['failed'])} that cannot be measured. {len(report['missing_truths'])} predictions without a truth.",
        "",
    ]
    rows = [[a, s, *values.values()] for a, by in report["summary"].items() for s, values in by.items()]
    columns = list(next(iter(report["objects"].values()))[settings["alignments"][0]])
    lines += ["## Summary", "", *_table(["alignment", "", *columns], rows), ""]
    if report["groups"]:
        rows = [[a, tier, *means.values()] for a, by in report["groups"].items() for tier, means in by.items()]
        lines += ["## Means by tier", "", *_table(["alignment", "tier", "objects", *columns], rows), ""]
    for alignment in settings["alignments"]:
        rows = [[name, *values[alignment].values()] for name, values in report["objects"].items()]
        lines += [f"## Objects, alignment {alignment}", "", *_table(["name", *columns], rows), ""]
    for key in ("missing_predictions", "missing_truths"):
        if report[key]:
            lines += [f"## {key.replace('_', ' ').capitalize()}", "", *(f"- {name}" for name in report[key]), ""]
    if report["failed"]:
        lines += ["## Not measured", "", *(f"- {name}: {why}" for name, why in report["failed"].items()), ""]
    lines += ["## Settings", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    lines += ["## Definitions", "", *(f"- {key}: {value}" for key, value in report["definitions"].items()), ""]
    return "\n".join(lines)


def _measure(jobs: Sequence[tuple[str, Path, Path]], settings: Settings, workers: int):
    """Names and metrics, or what is wrong with the files, in the order of the jobs."""
    measure = partial(_measure_files, settings=settings)
    if workers <= 1:
        yield from map(measure, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_use_one_thread) as pool:
        yield from pool.map(measure, jobs)


def _measure_files(job: tuple[str, Path, Path], settings: Settings) -> tuple[str, dict | str]:
    name, pred, truth = job
    try:
        return name, evaluate_pair(load_mesh(pred), load_mesh(truth), settings)
    except InputError as error:  # a bad file must not stop the others
        return name, str(error)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _find_meshes(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of meshes.")
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        if path.stem in found:
            raise InputError(f"{folder}: holds both {found[path.stem].name} and {path.name}. Keep one file a name.")
        found[path.stem] = path
    return found


def _read_groups(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise InputError(f"{path}: no such CSV of groups.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"name", "tier"} <= rows[0].keys():
        raise InputError(f"{path}: needs the columns name and tier, and at least one row.")
    return {row["name"]: row["tier"] for row in rows}


def _summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return {
        "mean": {key: round(float(values.mean()), 6) for key, values in columns.items()},
        "median": {key: round(float(np.median(values)), 6) for key, values in columns.items()},
    }


def _by_group(measured: dict, tiers: dict[str, str], alignments: Sequence[str]) -> dict:
    members: dict[str, list[str]] = {}
    for name in measured:
        members.setdefault(tiers.get(name, "not listed"), []).append(name)
    return {
        a: {
            tier: {"objects": len(names)} | _summary([measured[n][a] for n in names])["mean"]
            for tier, names in sorted(members.items())
        }
        for a in alignments
    }


def _table(header: list[str], rows: list[list]) -> list[str]:
    cells = [[f"{value:.4f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [header, *cells]]
    return [lines[0], "|" + " --- |" * len(header), *lines[1:]]


def _write(output: Path, report: dict, text: str) -> None:
    path = output if output.suffix.lower() == ".json" else output / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((path, json.dumps(report, indent=1)), (path.with_suffix(".md"), text)):
        partial_path = target.with_name(target.name + ".part")
        partial_path.write_text(content + "\n", encoding="utf-8")
        partial_path.replace(target)
