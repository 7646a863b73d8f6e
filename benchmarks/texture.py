"""Benchmark: time and memory of the texture refinement, step by step, beside the time of its ray casting alone.

    python benchmarks/texture.py [--faces 40000] [--size 320] [--texture-size 1024] [--threads 2] [--output REPORT.json]

The mesh is a mug out of a volume, as the volume stage would give it; the views are six true ones of `zero123plus-v1.2`. The steps
are those of `TextureRefinementPipeline.__call__`, with its default settings. Memory is the peak of the process, PyTorch and the making
of the example included, and that of the child that unwraps, which the system counts from the fork: never below the process's own then.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence

import harness
import numpy as np
import torch
import trimesh

from one2345pp import TextureRefinementPipeline, Views
from one2345pp.data.shapes import shape
from one2345pp.geometry.atlas import unwrap
from one2345pp.geometry.extract import finish_mesh, volume_to_mesh
from one2345pp.geometry.mesh import normalize_to_sphere
from one2345pp.geometry.rasterize import rasterize
from one2345pp.geometry.render import render
from one2345pp.geometry.views import DEFAULT_RIG
from one2345pp.geometry.volume import TRUNCATION_CELLS
from one2345pp.geometry.voxelize import SurfaceCloud


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, "threads", "report")
    parser.add_argument("--faces", type=int, default=40_000)
    parser.add_argument("--size", type=int, default=320, help="pixels along a side of the views")
    parser.add_argument("--texture-size", type=int, default=1024, help="pixels along a side of the texture")
    parser.add_argument("--steps", type=int, default=100, help="of the fit")
    args = harness.parse(parser, argv)
    truth, mesh = example(args.faces)
    views = harness.true_views(truth, DEFAULT_RIG, args.size, shading="none")
    before = harness.peak_memory()
    painted, seconds = refine(mesh, views, args)
    report = {
        "faces": len(mesh.faces),
        "views": [len(views), args.size],
        "texture": args.texture_size,
        "threads": args.threads,
        "seconds": seconds,
        "mebibytes": {
            "before": before,
            "peak": harness.peak_memory(),
            "peak of the child": harness.peak_memory(resource.RUSAGE_CHILDREN),
        },
        "psnr": {"before": psnr(mesh, views), "after": psnr(painted, views)},
    }
    harness.write_report(report, args.output)


def example(faces: int) -> tuple[trimesh.Trimesh, trimesh.Trimesh]:
    """A mug with its true colours, and the coloured mesh of a fine volume of it, decimated to `faces`."""
    truth = normalize_to_sphere(shape("mug"))
    cloud, resolution = SurfaceCloud.from_mesh(truth), 64
    while True:  # finer, until there is something to decimate
        mesh = volume_to_mesh(cloud.volume(resolution, TRUNCATION_CELLS / resolution))
        if len(mesh.faces) >= faces:
            return truth, finish_mesh(mesh, faces)
        resolution += 64


def refine(mesh: trimesh.Trimesh, views: Views, args: argparse.Namespace) -> tuple[trimesh.Trimesh, dict[str, float]]:
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
    visibility, seen = timed("observe", pipe.observe, mesh, views)
    prior = timed("sample the prior", pipe.sample_prior, mesh, visibility, generator)
    field = timed("fit", pipe.fit, mesh, seen, prior, args.steps, generator)
    painted = timed("bake", pipe.bake, mesh, atlas, field, visibility, args.texture_size)
    seconds["all"] = round(sum(seconds.values()), 3)
    timed("of it ray casting", rasterize, mesh, views.rig, args.size)
    return painted, seconds


def psnr(mesh: trimesh.Trimesh, views: Views) -> float:
    """Of the mesh's own pictures against the views, where both show the object."""
    wanted = np.stack([np.asarray(view) for view in views])
    return harness.psnr_inside(render(mesh, views.rig, wanted.shape[1], shading="none"), wanted)


if __name__ == "__main__":
    main()
