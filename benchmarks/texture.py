"""Benchmark: time and memory of the texture refinement, step by step, beside the time of its ray casting alone.

    python benchmarks/texture.py [--faces 40000] [--size 320] [--texture-size 1024] [--threads 2] [--output REPORT.json]

The mesh is a mug out of a volume, as the volume stage would give it; the views are six true ones of `zero123plus-v1.2`. The steps
are those of `TextureRefinementPipeline.__call__`, with its default settings. Memory is the peak of the process, PyTorch and the making
of the example included, and that of the child that unwraps, which the system counts from the fork: never below the process's own then.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image

from one2345pp import CameraRig, TextureRefinementPipeline
from one2345pp.data.shapes import shape
from one2345pp.geometry.atlas import unwrap
from one2345pp.geometry.extract import finish_mesh, volume_to_mesh
from one2345pp.geometry.mesh import normalize_to_sphere
from one2345pp.geometry.rasterize import rasterize
from one2345pp.geometry.render import render
from one2345pp.geometry.voxelize import SurfaceCloud


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    truth, mesh = example(args.faces)
    rig = CameraRig.named("zero123plus-v1.2")
    views = [Image.fromarray(view) for view in render(truth, rig, args.size, shading="none")]
    before = peak_memory(resource.RUSAGE_SELF)
    painted, seconds = refine(mesh, views, rig, args)
    report = {
        "faces": len(mesh.faces),
        "views": [len(views), args.size],
        "texture": args.texture_size,
        "threads": args.threads,
        "seconds": seconds,
        "mebibytes": {
            "before": before,
            "peak": peak_memory(resource.RUSAGE_SELF),
            "peak of the child": peak_memory(resource.RUSAGE_CHILDREN),
        },
        "psnr": {"before": psnr(mesh, views, rig, args.size), "after": psnr(painted, views, rig, args.size)},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=40_000)
    parser.add_argument("--size", type=int, default=320, help="pixels along a side of the views")
    parser.add_argument("--texture-size", type=int, default=1024, help="pixels along a side of the texture")
    parser.add_argument("--steps", type=int, default=100, help="of the fit")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    return parser.parse_args()


def example(faces: int) -> tuple[trimesh.Trimesh, trimesh.Trimesh]:
    """A mug with its true colours, and the coloured mesh of a fine volume of it, decimated to `faces`."""
    truth = normalize_to_sphere(shape("mug"))
    resolution = 128
    while True:  # finer, until there is something to decimate
        mesh = volume_to_mesh(SurfaceCloud.from_mesh(truth).volume(resolution, 3.2 / resolution))
        if len(mesh.faces) >= faces:
            return truth, finish_mesh(mesh, faces)
        resolution += 64


def refine(
    mesh: trimesh.Trimesh, views: list[Image.Image], rig: CameraRig, args: argparse.Namespace
) -> tuple[trimesh.Trimesh, dict[str, float]]:
    """The painted mesh, and the seconds of each step of the pipeline's call, of all, and of the ray casting alone."""
    pipe, generator = TextureRefinementPipeline(), torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    seconds: dict[str, float] = {}

    def timed(name: str, work, *arguments):
        start = time.perf_counter()
        result = work(*arguments)
        seconds[name] = round(time.perf_counter() - start, 3)
        return result

    atlas = timed("unwrap", unwrap, mesh, args.texture_size)
    visibility, seen = timed("observe", pipe.observe, mesh, views, rig)
    prior = timed("sample the prior", pipe.sample_prior, mesh, visibility, generator)
    field = timed("fit", pipe.fit, mesh, seen, prior, args.steps, generator)
    painted = timed("bake", pipe.bake, mesh, atlas, field, visibility, args.texture_size)
    seconds["all"] = round(sum(seconds.values()), 3)
    timed("of it ray casting", rasterize, mesh, rig, args.size)
    return painted, seconds


def peak_memory(who: int) -> int:
    """Peak resident memory in MiB of this process or of its largest child."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes, or KiB
    return resource.getrusage(who).ru_maxrss * unit // 2**20


def psnr(mesh: trimesh.Trimesh, views: list[Image.Image], rig: CameraRig, size: int) -> float:
    """Of the mesh's own pictures against the views, where both show the object."""
    found = render(mesh, rig, size, shading="none").astype(np.float64)
    wanted = np.stack([np.asarray(view, np.float64) for view in views])
    both = (found[..., 3] == 255) & (wanted[..., 3] == 255)
    error = np.square(found[both][:, :3] - wanted[both][:, :3]).mean()
    return round(float(10 * np.log10(255**2 / error)), 2)


if __name__ == "__main__":
    main()
