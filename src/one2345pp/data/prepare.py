"""Meshes to training samples: for each object a few azimuth frames (views, input pictures, a volume) or rings (views alone).

A frame is one file `NAME.FRAME.zip`, written by `data.pack` and read by `data.dataset`. Everything in it is in the world of the
frame's azimuth: the pictures that cameras see when that azimuth is the front, and the volume of the object turned likewise. A ring is
six frames, 60 degrees apart, that share their views: a named rig's cameras stand 60 degrees apart at two elevations, so 12 views serve
all six.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image

from .. import names
from ..errors import InputError
from ..files import read_json
from ..geometry.cameras import CameraRig
from ..geometry.framing import frame_object
from ..geometry.mesh import load_mesh, normalize_to_sphere
from ..geometry.render import render
from ..geometry.volume import TRUNCATION_CELLS, cell_centers
from ..geometry.voxelize import SurfaceCloud
from .dataset import FORMAT
from .maps import MAPS, check_maps
from .pack import write_sample
from .shapes import random_shape
from .sources import find_sources
from .variation import recolor_randomly, stretch_randomly


logger = logging.getLogger(__name__)

RIGS = tuple(names.RIGS)
INPUTS_PER_FRAME = 2
RING = 6  # frames of a ring
INPUT_ELEVATIONS, INPUT_FOVS = (-10.0, 40.0), (20.0, 60.0)  # degrees
NADIR = -90  # degrees; elevations are stored as whole degrees above it


def prepare(
    meshes: list[Path],
    output: Path,
    *,
    frames: int = 2,
    view_size: int = 96,
    resolution: int = 64,
    workers: int | None = None,
    seed: int = 0,
    table: Path | None = None,
    split: str | None = None,
    rings: list[str] | None = None,
    shapes: int = 0,
    maps: Sequence[str] = (),
    vary: bool = False,
) -> list[str]:
    """Render and voxelise meshes into a folder that training reads. Frames that are there already are kept, objects are added.

    Args:
        meshes: Mesh files, or folders of them; see `sources.find_meshes` for the names of their objects.
        output: Folder to write.
        frames: Azimuth frames (or rings) an object: the front, of rings one for each rig, then random ones.
        view_size: Side of the pictures in pixels.
        resolution: Cells along an edge of the volume.
        workers: Processes, defaults to the number of cores.
        seed: With the object's name, decides azimuths, input cameras and light.
        table: CSV with columns `name` and `tier`, for sampling by tier. Objects that it lacks are `lowpoly`.
        split: Only objects whose column `split` in the table says so.
        rings: Make rings of these rigs in turn, which the first stage learns from, instead of frames, which the volume stages need.
        shapes: So many random procedural objects beside the meshes, tier `procedural`.
        maps: Frames hold these maps of their views, too, names in `MAPS`, for condition encoders that take them.
        vary: All frames of an object but its fronts are of another one, stretched and recoloured, see `variation`.

    Returns:
        A line for each object that could not be used, saying why.

    Raises:
        InputError: If there is nothing to prepare or to vary, a map is unknown or asked of rings, two objects have one name, the table
            cannot be read, or the folder holds samples with other settings. Nothing is written then.
    """
    if not meshes and not shapes:
        raise InputError("meshes: none given. Pass mesh files or a folder that holds some.")
    fronts = len(rings or [None])
    if vary and frames <= fronts:
        raise InputError(
            f"vary: the first {fronts} frame(s) of an object are of itself, and frames is {frames}. Ask for more frames."
        )
    check_maps(maps := sorted(set(maps)))
    if maps and rings is not None:
        raise InputError(f"maps: rings have none, got {', '.join(maps)}. Leave them out, or prepare frames.")
    sources, tiers = find_sources(meshes, table, split, shapes)
    rigs = RIGS if rings is None else tuple(rings)
    settings = {
        "format": FORMAT,
        "view_size": view_size,
        "resolution": resolution,
        "rigs": list(rigs),
        "inputs": INPUTS_PER_FRAME,
        "rings": rings is not None,
        "maps": maps,
        "truncation": TRUNCATION_CELLS / resolution,
    }
    output = Path(output)
    _write_index(output, settings, tiers)
    spec = {
        "view_size": view_size,
        **({"resolution": resolution, "maps": maps} if rings is None else {"rigs": rigs}),
    }
    jobs = [(*source, output, frame, seed, vary, spec) for frame in range(frames) for source in sources.items()]
    with ProcessPoolExecutor(workers) as pool:
        problems = [problem for problem in pool.map(_prepare_frame, jobs, chunksize=4) if problem]
    for problem in problems:
        logger.warning(problem)
    return problems


def _write_index(output: Path, settings: dict, tiers: dict[str, str | None]) -> None:
    """Write `index.json`, or add objects to the one that is there. Without a tier, objects keep theirs, and new ones are `lowpoly`.

    Raises:
        InputError: If the samples that are there have other settings.
    """
    index, known = output / "index.json", {}
    if index.exists():
        there = read_json(index, "Prepare into another folder.")
        there.setdefault("maps", ["normals"] if there.get("normals") else [])  # from before maps had names
        known = there.get("tiers", {})
        others = [key for key, value in settings.items() if there.get(key) != value]
        if others:
            differences = "; ".join(f"{key} is {there.get(key)}, not {settings[key]}" for key in others)
            raise InputError(
                f"{output}: holds samples with other settings: {differences}. Prepare into another folder."
            )
    tiers = {**known, **{name: tier or known.get(name, "lowpoly") for name, tier in tiers.items()}}
    output.mkdir(parents=True, exist_ok=True)
    partial = output / "index.json.part"
    partial.write_text(json.dumps({**settings, "tiers": tiers}))
    partial.replace(index)


def _prepare_frame(job: tuple[str, Path | None, Path, int, int, bool, dict]) -> str | None:
    """One file of `prepare`; a source without a file is a procedural object, which its name decides."""
    name, file, output, frame, seed, vary, spec = job
    target = output / f"{name}.{frame}.zip"
    if target.exists():
        return None
    torch.set_num_threads(1)  # one process a core already
    number = zlib.crc32(name.encode())
    rng = np.random.default_rng([seed, number, frame])
    try:
        if file is None:
            mesh = random_shape(torch.Generator().manual_seed(number))
        else:
            mesh = normalize_to_sphere(load_mesh(file))
        front = frame < len(spec.get("rigs", [None]))
        vary = vary and not front
        varied = np.random.default_rng([seed, number, frame, 1])  # draws of its own: azimuths and lights stay
        if vary:
            mesh = stretch_randomly(mesh, varied)
        azimuth = 0.0 if front else rng.uniform(0, 360)
        if "rigs" in spec:
            sample = make_ring(mesh, azimuth, rng, spec["view_size"], spec["rigs"], frame % len(spec["rigs"]))
        else:
            sample = make_frame(mesh, azimuth, rng, **spec)
        if vary:
            sample = recolor_randomly(sample, varied)
    except InputError as error:
        return f"{name}: {error}"
    write_sample(target, sample)
    return None


def make_frame(
    mesh: trimesh.Trimesh,
    azimuth: float,
    rng: np.random.Generator,
    view_size: int,
    resolution: int = 64,
    maps: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """One azimuth frame of a sphere-normalised mesh.

    Returns:
        `views [12, S, S, 4]` uint8 (six of each of `RIGS`), `inputs [I, S, S, 4]` uint8, `sdf [X, Y, Z]` int8 (127 is the truncation
        distance) and `colors [N, 3]` uint8 of the cells with |sdf| < 127 in row-major order; the views' `maps` by their names,
        `[12, S, S, C]` uint8. `elevations [I]` uint8 are those of the inputs, from `NADIR` up.
    """
    rig = CameraRig.cat([CameraRig.named(name) for name in RIGS]).rotated(azimuth)
    views = render(mesh, rig, view_size)
    inputs, elevations = render_inputs(mesh, azimuth, view_size, rng)
    extra = {
        name: render(mesh, rig, view_size, shading=MAPS[name].shading)[..., : MAPS[name].channels] for name in maps
    }
    pictures = {"views": views, "inputs": inputs, "elevations": elevations, **extra}
    return {**pictures, **_make_volume(mesh, azimuth, resolution)}


def make_ring(
    mesh: trimesh.Trimesh,
    azimuth: float,
    rng: np.random.Generator,
    view_size: int,
    rigs: tuple[str, ...] = RIGS[:1],
    index: int = 0,
) -> dict[str, np.ndarray]:
    """Six azimuth frames of a sphere-normalised mesh, at `azimuth + 60 k` degrees, without volumes.

    Args:
        rigs: Those of the data set.
        index: Which of them this ring is of.

    Returns:
        `views [2, 6, S, S, 4]` uint8: the rig's first and second elevation, each at `azimuth + 30 + 60 m`; so view `j` of frame `k` is
        `views[j % 2, (k + j) % 6]`. `inputs [6, I, S, S, 4]` uint8: the pictures of each frame's front; `elevations [6, I]` uint8:
        those of their cameras, in degrees from `NADIR` up. `rig [1]` uint8: the index.
    """
    rig = CameraRig.named(rigs[index])
    # The rig and itself turned by 60 degrees: the same azimuths, each at the other elevation.
    turned = [render(mesh, rig.rotated(azimuth + shift), view_size) for shift in (0, 60)]
    views = np.empty((2, RING, *turned[0].shape[1:]), np.uint8)
    for shift, drawn in enumerate(turned):
        for j, view in enumerate(drawn):
            views[j % 2, (j + shift) % RING] = view
    fronts = azimuth + 60 * np.arange(RING)
    pairs = [render_inputs(mesh, front, view_size, rng) for front in fronts]
    inputs, elevations = (np.stack(part) for part in zip(*pairs, strict=True))
    return {"views": views, "inputs": inputs, "elevations": elevations, "rig": np.array([index], np.uint8)}


def _make_volume(mesh: trimesh.Trimesh, azimuth: float, resolution: int) -> dict[str, np.ndarray]:
    truncation = TRUNCATION_CELLS / resolution
    cloud = SurfaceCloud.from_mesh(mesh)
    volume = cloud.volume(resolution, truncation, azimuth)
    sdf = np.zeros([resolution] * 3, np.int8)
    turned = CameraRig.from_angles([azimuth], 0, 1.0, 1.0).camera_to_world[0, :3, :3]  # its axes are the frame's
    centers = cell_centers(torch.from_numpy(np.argwhere(sdf == 0)), resolution)
    outside = cloud.is_outside((centers @ turned.T).numpy()).reshape(sdf.shape)
    sdf[...] = np.where(outside, 127, -127)
    x, y, z = volume.coords.numpy().T
    sdf[x, y, z] = np.clip(np.round(volume.sdf.numpy() / truncation * 127), -126, 126)
    return {"sdf": sdf, "colors": np.round(volume.colors.numpy() * 255).astype(np.uint8)}


def render_inputs(
    mesh: trimesh.Trimesh, azimuth: float, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Input pictures of one front, `[I, size, size, 4]`, and their elevations in degrees from `NADIR` up, `[I]`, both uint8."""
    pictures, elevations = zip(*(render_input(mesh, azimuth, size, rng) for _ in range(INPUTS_PER_FRAME)), strict=True)
    return np.stack(pictures), np.round(np.array(elevations) - NADIR).astype(np.uint8)


def render_input(
    mesh: trimesh.Trimesh, azimuth: float, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """The picture a person might take of the front: any elevation and lens, light from above, framed. `[size, size, 4]` uint8, and
    the elevation in degrees."""
    elevation, fov = rng.uniform(*INPUT_ELEVATIONS), math.radians(rng.uniform(*INPUT_FOVS))
    rig = CameraRig.from_angles([azimuth], elevation, fov, 0.5 / math.sin(fov / 2))
    light = None
    if rng.random() < 0.5:
        light = rng.normal(size=3) + np.array([0, 1.0, 0])
        light = (light / np.linalg.norm(light)).astype(np.float32)
    picture = render(mesh, rig, round(size * 1.25), light=light)[0]
    return np.asarray(frame_object(Image.fromarray(picture), size)), elevation
