"""Benchmark: time and memory of the two volume networks for one sample, random weights, as their grids grow.

    python benchmarks/volume_size.py configs/occupancy-full.json configs/sparse-full.json [--scales 1 2] [--output REPORT.json]

Each network runs alone, in a process of its own: its condition encoder once and one denoising step, without guidance. The sparse
voxels are a sphere's shell, three coarse cells thick and of half the cube's width, subdivided: about as many as an object has.
`--scales 2` doubles every grid, with the same widths. The views' patch features are random, as large as DINOv2's, which is not timed.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import torch

from one2345pp import CameraRig, ConditionEncoder, OccupancyUNet3DModel, SparseUNet3DModel
from one2345pp.geometry.views import DEFAULT_RIG
from one2345pp.models.condition_encoder import project_pixels
from one2345pp.models.sparse import SparseGrid
from one2345pp.models.view_batch import ViewBatch


PATCH = 14  # pixels along a side of a patch of DINOv2


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, "threads", "report")
    parser.add_argument("configs", type=Path, nargs="+", help="configs of train occupancy or train sparse")
    parser.add_argument("--scales", type=int, nargs="+", default=[1], help="multiply every grid's resolution")
    args = harness.parse(parser, argv)
    context, rows = multiprocessing.get_context("spawn"), []
    for file in args.configs:
        config = json.loads(file.read_text())
        for scale in args.scales:
            with context.Pool(1) as pool:  # a process each, so that peaks are its own
                rows.append({"config": file.stem, **pool.apply(measure, (config, scale, args.threads))})
            print(json.dumps(rows[-1]), flush=True)
    harness.write_report({"torch": torch.__version__, "threads": args.threads, "rows": rows}, args.output)


@torch.no_grad()
def measure(config: dict, scale: int, threads: int) -> dict:
    """Seconds of the condition and of one step, voxels, parameters, and MiB beyond what the weights and libraries take."""
    torch.set_num_threads(threads)
    sparse = "pixel_channels" in config["unet"]
    side = scale * config["unet"]["sample_size"]
    torch.manual_seed(0)
    unet = (SparseUNet3DModel if sparse else OccupancyUNet3DModel)(**config["unet"] | {"sample_size": side}).eval()
    condition = ConditionEncoder(**config["condition"] | {"resolution": side, "sparse": sparse}).eval()
    before = harness.peak_memory()
    views = random_views(condition)
    grid = shell(side) if sparse else None
    vector = torch.randn(1, config["unet"]["global_channels"])
    start = time.perf_counter()
    pyramid = condition(views, grid)
    middle = time.perf_counter()
    if sparse:
        unet(torch.randn(len(grid), 4), 500, grid, pyramid, vector, project_pixels(views, grid))
    else:
        unet(torch.randn(1, 1, side, side, side), 500, pyramid, vector)
    end = time.perf_counter()
    return {
        "side": side,
        "voxels": len(grid) if sparse else side**3,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "condition_seconds": round(middle - start, 2),
        "step_seconds": round(end - middle, 2),
        "mebibytes": harness.peak_memory() - before,
    }


def random_views(condition: ConditionEncoder) -> ViewBatch:
    """Six views of noise with the features that the encoder takes."""
    size, channels = condition.config.image_size, condition.config.patch_channels
    patches = torch.randn(1, 6, channels, size // PATCH, size // PATCH) if channels else None
    rig = CameraRig.named(DEFAULT_RIG)
    return ViewBatch(
        images=torch.rand(1, 6, condition.view_channels, size, size) * 2 - 1,
        world_to_camera=rig.world_to_camera[None],
        tan_half_fov=rig.tan_half_fov[None],
        half_width=rig.half_width[None],
        present=torch.ones(1, 6, dtype=torch.bool),
        patches=patches,
    )


def shell(side: int) -> SparseGrid:
    """The children of coarse cells within 1.5 cells of a sphere of radius a quarter of the cube."""
    coarse = side // 2
    axis = torch.arange(coarse) + 0.5 - coarse / 2
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    occupied = (distance - coarse / 4).abs() < 1.5
    return SparseGrid(occupied[None].nonzero(), coarse, 1).subdivided()


if __name__ == "__main__":
    main()
