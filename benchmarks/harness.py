"""What the benchmarks share: their options, held-out objects and true pictures of them, figures, tables and sheets.

A benchmark is `main(argv)` in a file of its own, which imports this one and no other. Numbers of meshes: `one2345pp.evaluation`.
"""

# V views, S pixels along a side of a picture

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import trimesh
from diffusers import DiffusionPipeline
from PIL import Image

from one2345pp import CameraRig, MultiViewTilePipeline, One2345PlusPlusPipeline, Views, default_checkpoint
from one2345pp.errors import InputError
from one2345pp.evaluation.metrics import MAX_PSNR
from one2345pp.files import read_table
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.mesh import load_mesh, normalize_to_sphere
from one2345pp.geometry.render import contact_sheet, render


Item = TypeVar("Item")

INPUT_ELEVATION = 10.0  # degrees above the horizon from which input pictures look, if an option does not say


# --- options ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "objects": ("--objects", {"type": Path, "required": True, "help": "folder of NAME.glb"}),
    "index": ("--index", {"type": Path, "required": True, "help": "CSV with the columns name, split, tier"}),
    "output": ("--output", {"type": Path, "required": True, "help": "folder for what is measured"}),
    "report": ("--output", {"type": Path, "metavar": "REPORT.json", "help": "also write the figures as JSON"}),
    "model": ("--model", {"default": str(default_checkpoint()), "help": "default: the checkpoint in the package"}),
    "limit": ("--limit", {"type": int, "help": "only so many objects, spread over the set"}),
    "every": ("--every", {"type": int, "default": 1, "help": "every k-th object in alphabetical order"}),
    "seed": ("--seed", {"type": int, "default": 0}),
    "threads": ("--threads", {"type": int, "default": 2, "help": "threads of torch"}),
}


def make_parser(doc: str, *options: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring, with these of `OPTIONS`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in options:
        flag, settings = OPTIONS[name]
        parser.add_argument(flag, **settings)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with torch on as many threads as they say."""
    args = parser.parse_args(argv)
    if "threads" in args:
        torch.set_num_threads(args.threads)
    return args


def load_chain(model: str, device: str = "cpu") -> One2345PlusPlusPipeline:
    """A whole checkpoint, quiet."""
    pipe = One2345PlusPlusPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_first_stage(model: str) -> MultiViewTilePipeline:
    """The first stage of a whole checkpoint, or one that was saved alone, quiet."""
    if "occupancy_unet" in DiffusionPipeline.load_config(model):
        return load_chain(model).multiview
    pipe = MultiViewTilePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- objects and their true pictures ----------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """An object that no network was trained on."""

    name: str
    tier: str
    path: Path

    def load(self) -> trimesh.Trimesh:
        """Its mesh in the frame in which meshes leave the package."""
        return normalize_to_sphere(load_mesh(self.path))


def held_out_objects(folder: Path, index: Path) -> list[HeldOut]:
    """The rows of a table whose split is `val`, in the order of tier and name. Raises `InputError` if there are none, or no meshes."""
    rows = [row for row in read_table(index, ("name", "split", "tier")) if row["split"] == "val"]
    if not rows:
        raise InputError(f"{index}: no row has the split 'val'. Pass a table of held-out objects.")
    objects = [HeldOut(row["name"], row["tier"], folder / f"{row['name']}.glb") for row in rows]
    if missing := [one.path.name for one in objects if not one.path.is_file()]:
        raise InputError(f"{folder}: lacks {len(missing)} of the table's objects, such as {missing[0]}.")
    return sorted(objects, key=lambda one: (one.tier, one.name))


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """So many of the items, at even distances; all of them without a limit."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def true_views(mesh: trimesh.Trimesh, rig: CameraRig | str, size: int, shading: str = "soft") -> Views:
    """The mesh as a rig sees it."""
    rig = CameraRig.of(rig)
    return Views([Image.fromarray(view) for view in render(mesh, rig, size, shading=shading)], rig)


def front_camera(elevation: float = INPUT_ELEVATION) -> CameraRig:
    """The camera of an input picture: azimuth 0, the field of view and distance of `zero123plus-v1.2`."""
    fov = math.radians(30)
    return CameraRig.from_angles([0.0], elevation, fov, 0.5 / math.tan(fov / 2))


def front_picture(mesh: trimesh.Trimesh, size: int, elevation: float = INPUT_ELEVATION) -> Image.Image:
    """The input picture, rendered at `size` and framed as the chain prepares pictures, so that calls take `background="none"`."""
    return frame_object(true_views(mesh, front_camera(elevation), size)[0])


@dataclass(frozen=True)
class Results:
    """Which files `reconstruct_val.py` leaves in its output folder, for those that read them."""

    folder: Path

    @property
    def names(self) -> list[str]:
        """Of the objects, in alphabetical order."""
        return sorted(path.stem for path in (self.folder / "gt").glob("*.glb"))

    def truth(self, name: str) -> HeldOut:
        return HeldOut(name, "", self.folder / "gt" / f"{name}.glb")

    def meshes(self, method: str) -> Path:
        """Folder of a method's meshes."""
        return self.folder / "pred" / method

    def mesh(self, method: str, name: str) -> Path:
        """A method's mesh, which need not be there: GLB with a texture, or PLY with colours of its vertices."""
        painted = self.meshes(method) / f"{name}.glb"
        return painted if painted.exists() else painted.with_suffix(".ply")

    def drawn_views(self, name: str) -> Path:
        """The views that were drawn of an object, side by side in one picture."""
        return self.folder / "generated_views" / f"{name}.png"


# --- figures ----------------------------------------------------------------------------------------------------


def mask(
    picture: Image.Image | np.ndarray,  # [..., S, S, 4]
) -> np.ndarray:
    """Where a picture shows the object, `[..., S, S]` bool."""
    return np.asarray(picture)[..., 3] >= 128


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks or grids, bool; 1 where there is nothing in either."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB between values in [0, 1], at most `MAX_PSNR`."""
    error = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return float(min(-10 * np.log10(max(error, 1e-12)), MAX_PSNR))


def psnr_inside(
    found: np.ndarray,  # [V, S, S, 4] uint8
    truth: np.ndarray,  # [V, S, S, 4] uint8
) -> float:
    """dB over the pixels that both pictures cover; 0 if there are none."""
    both = (found[..., 3] == 255) & (truth[..., 3] == 255)
    return psnr(found[both][:, :3] / 255, truth[both][:, :3] / 255) if both.any() else 0.0


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every column."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def by_tier(rows: Sequence[Item], tiers: Sequence[str]) -> dict[str, list[Item]]:
    """The rows of each tier, in alphabetical order; `tiers` has one a row."""
    return {name: [r for r, t in zip(rows, tiers, strict=True) if t == name] for name in sorted(set(tiers))}


def peak_memory(who: int = resource.RUSAGE_SELF) -> int:
    """Peak resident memory in MiB of this process, or of its largest child."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes, or KiB
    return resource.getrusage(who).ru_maxrss * unit // 2**20


# --- what is written --------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 3) -> str:
    """A Markdown table; fractions have so many digits, `None` leaves a cell empty. Raises `InputError` without rows."""
    if not rows:
        raise InputError("table: nothing was measured. What was said above tells why.")

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in (columns, *rows)]
    lines.insert(1, "|" + " --- |" * len(columns))
    return "\n".join(lines) + "\n"


def write_report(report: Mapping[str, Any], path: Path | None, text: str | None = None) -> None:
    """Print a report, and write it as JSON if there is a path. `text`, its readable form, is printed instead and written beside it."""
    figures = json.dumps(report, indent=1) + "\n"
    print(figures if text is None else text, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(figures)
        if text is not None:
            path.with_suffix(".md").write_text(text)


def save_sheet(
    rows: Sequence[Sequence[Image.Image | np.ndarray]], path: Path, size: int, colors: int | None = None, **options
) -> None:
    """Pictures in rows as one picture, see `contact_sheet`; with a palette of `colors`. Raises `InputError` without rows."""
    if not rows:
        raise InputError(f"{path}: there is nothing to show. What was said above tells why.")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(rows, size, **options)
    (sheet if colors is None else sheet.quantize(colors)).save(path, optimize=True)


def split_row(strip: Image.Image) -> list[Image.Image]:
    """The square pictures of a sheet of one row without gaps."""
    side = strip.height
    return [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
