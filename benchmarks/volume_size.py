"""Benchmark: time and memory of the two volume networks for one sample, random weights, as their grids grow.

    python benchmarks/volume_size.py configs/occupancy-full.json configs/sparse-full.json [--scales 1 2] [--output REPORT.json]

Each network runs alone, in a process of its own: its condition encoder once and one denoising step, without guidance. The sparse
voxels are a sphere's shell, three coarse cells thick and of half the cube's width, subdivided: about as many as an object has.
`--scales 2` doubles every grid, with the same widths. The views' patch features are random, as large as DINOv2's, which is not timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

from one2345pp import CameraRig, ConditionEncoder, OccupancyUNet3DModel, SparseUNet3DModel
from one2345pp.models.condition_encoder import ViewBatch, project_pixels
from one2345pp.models.sparse import SparseGrid


def main() -> None:
    args = parse_arguments()
    rows = []
    context = multiprocessing.get_context("spawn")
    for file in args.configs:
        for scale in args.scales:
            config = json.loads(file.read_text())
            with context.Pool(1) as pool:  # a process each, so that peaks are its own
                rows.append({"config": file.stem, **pool.apply(measure, (config, scale, args.threads))})
            print(json.dumps(rows[-1]), flush=True)
    if args.output is not None:
        args.output.write_text(
            json.dumps({"torch": torch.__version__, "threads": args.threads, "rows": rows}, indent=1)
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", help="configs of train occupancy or train sparse")
    parser.add_argument("--scales", type=int, nargs="+", default=[1], help="multiply every grid's resolution")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    return parser.parse_args()


@torch.no_grad()
def measure(config: dict, scale: int, threads: int) -> dict:
    """Seconds of the condition and of one step, voxels, parameters, and MiB beyond what the weights and libraries take."""
    torch.set_num_threads(threads)
    sparse = "pixel_channels" in config["unet"]
    side = scale * config["unet"]["sample_size"]
    torch.manual_seed(0)
    unet = (SparseUNet3DModel if sparse else OccupancyUNet3DModel)(**config["unet"] | {"sample_size": side}).eval()
    condition = ConditionEncoder(**config["condition"] | {"resolution": side, "sparse": sparse}).eval()
    before = peak_mebibytes()
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
        "mebibytes": peak_mebibytes() - before,
    }


def random_views(condition: ConditionEncoder) -> ViewBatch:
    """Six views of noise with the features that the encoder takes."""
    size, channels = condition.config.image_size, condition.config.patch_channels
    patches = torch.randn(1, 6, channels, size // 14, size // 14) if channels else None
    images = torch.rand(1, 6, condition.config.view_channels, size, size) * 2 - 1
    return ViewBatch.make(images, [CameraRig.named("zero123plus-v1.2")], patches)


def shell(side: int) -> SparseGrid:
    """The children of coarse cells within 1.5 cells of a sphere of radius a quarter of the cube."""
    coarse = side // 2
    axis = torch.arange(coarse) + 0.5 - coarse / 2
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    occupied = (distance - coarse / 4).abs() < 1.5
    return SparseGrid(occupied[None].nonzero(), coarse, 1).subdivided()


def peak_mebibytes() -> int:
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


if __name__ == "__main__":
    main()
