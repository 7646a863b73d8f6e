"""Meshes to training samples: for each object a few azimuth frames, each with views, input pictures and a volume.

A frame is one file `NAME.FRAME.npz`, read by `data.dataset`. Everything in it is in the world of the frame's azimuth: the pictures
that cameras see when that azimuth is the front, and the volume of the object turned likewise.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.framing import frame_object
from ..geometry.mesh import load_mesh, normalize_to_sphere
from ..geometry.render import render
from ..geometry.volume import cell_centers
from ..geometry.voxelize import SurfaceCloud


logger = logging.getLogger(__name__)

RIGS = ("zero123plus-v1.2", "zero123plus-v1.1")
INPUTS_PER_FRAME = 2
TRUNCATION_CELLS = 3.2  # LAS-Diffusion clips the distance at 0.05 of a half-extent of 1: 3.2 cells of 128
INPUT_ELEVATIONS, INPUT_FOVS = (-10.0, 40.0), (20.0, 60.0)  # degrees


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
    rigs: tuple[str, ...] = RIGS,
    volumes: bool = True,
) -> list[str]:
    """Render and voxelise meshes into a folder that training reads. Frames that are there already are kept.

    Args:
        meshes: Mesh files; the file's stem is the object's name.
        output: Folder to write.
        frames: Azimuth frames an object: the front, then random ones.
        view_size: Side of the pictures in pixels.
        resolution: Cells along an edge of the volume.
        workers: Processes, defaults to the number of cores.
        seed: With the object's name, decides azimuths, input cameras and light.
        table: CSV with columns `name` and `tier`, for sampling by tier.
        rigs: Rigs to draw; the volume stages train on both named ones, the first stage needs one.
        volumes: Whether to make volumes; the first stage needs none.

    Returns:
        A line for each object that could not be used, saying why.
    """
    if not meshes:
        raise InputError("meshes: none given. Pass mesh files or a folder that holds some.")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    tiers = {} if table is None else _read_tiers(table)
    meta = {"format": 1, "view_size": view_size, "resolution": resolution, "rigs": rigs, "inputs": INPUTS_PER_FRAME}
    meta["tiers"] = {Path(m).stem: tiers.get(Path(m).stem, "lowpoly") for m in meshes}
    meta["truncation"] = TRUNCATION_CELLS / resolution
    (output / "index.json").write_text(json.dumps(meta))
    spec = {"view_size": view_size, "rigs": rigs, "resolution": resolution if volumes else None}
    jobs = [(Path(m), output, frame, seed, spec) for frame in range(frames) for m in meshes]
    with ProcessPoolExecutor(workers) as pool:
        problems = [problem for problem in pool.map(_prepare_frame, jobs, chunksize=4) if problem]
    for problem in problems:
        logger.warning(problem)
    return problems


def _read_tiers(table: Path) -> dict[str, str]:
    try:
        with open(table, newline="", encoding="utf-8") as file:
            return {row["name"]: row["tier"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise InputError(f"{table}: is not a CSV with the columns name and tier ({error!r}).") from None


def _prepare_frame(job: tuple[Path, Path, int, int, dict]) -> str | None:
    path, output, frame, seed, spec = job
    target = output / f"{path.stem}.{frame}.npz"
    if target.exists():
        return None
    torch.set_num_threads(1)  # one process a core already
    rng = np.random.default_rng([seed, zlib.crc32(path.stem.encode()), frame])
    try:
        mesh = normalize_to_sphere(load_mesh(path))
        sample = make_frame(mesh, 0.0 if frame == 0 else rng.uniform(0, 360), rng, **spec)
    except InputError as error:
        return f"{path.stem}: {error}"
    partial = target.with_name(target.name + ".part")
    with open(partial, "wb") as file:
        np.savez_compressed(file, **sample)
    partial.replace(target)
    return None


def make_frame(
    mesh: trimesh.Trimesh,
    azimuth: float,
    rng: np.random.Generator,
    view_size: int,
    rigs: tuple[str, ...] = RIGS,
    resolution: int | None = 64,
) -> dict[str, np.ndarray]:
    """One azimuth frame of a sphere-normalised mesh.

    Returns:
        `views [6 * len(rigs), S, S, 4]` uint8, `inputs [I, S, S, 4]` uint8 and, unless `resolution` is `None`, `sdf [X, Y, Z]` int8
        (127 is the truncation distance) and `colors [N, 3]` uint8 of the cells with |sdf| < 127 in row-major order.
    """
    rig = CameraRig.cat([CameraRig.named(name) for name in rigs])
    views = render(mesh, rig.rotated(azimuth), view_size)
    inputs = [render_input(mesh, azimuth, view_size, rng) for _ in range(INPUTS_PER_FRAME)]
    sample = {"views": views, "inputs": np.stack(inputs)}
    return sample if resolution is None else {**sample, **_make_volume(mesh, azimuth, resolution)}


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


def render_input(mesh: trimesh.Trimesh, azimuth: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """The picture a person might take of the front: any elevation and lens, light from above, framed. `[size, size, 4]` uint8."""
    elevation, fov = rng.uniform(*INPUT_ELEVATIONS), math.radians(rng.uniform(*INPUT_FOVS))
    rig = CameraRig.from_angles([azimuth], elevation, fov, 0.5 / math.sin(fov / 2))
    light = None
    if rng.random() < 0.5:
        light = rng.normal(size=3) + np.array([0, 1.0, 0])
        light = (light / np.linalg.norm(light)).astype(np.float32)
    picture = render(mesh, rig, round(size * 1.25), light=light)[0]
    return np.asarray(frame_object(Image.fromarray(picture), size))
