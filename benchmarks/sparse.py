"""Benchmark: the sparse engine's convolution against the machine's matrix products, dense convolution and spconv, in one run.

    python benchmarks/sparse.py [--channels 16 32 64 128] [--voxels 10000 50000 200000 1000000] [--output REPORT.json]

The voxels are a sphere's shell, three cells thick, in the order of their coordinates, as a volume's are. Every time is the median of
several calls without gradients, in float32. Columns of the table:

- `ours`: 2 * 27 * C * C * N operations over the time of `submanifold_conv3d`, on all threads asked for.
- `share`: of the rate of a plain product of `[8192, 27 C]` by `[27 C, C]` on as many threads, timed just before.
- `dense`: how many times longer `torch.nn.functional.conv3d` takes on the whole grid; only where that fits in `--dense-gib`.
- `spconv`: how many times longer spconv takes on one thread than ours on one thread; `spconv_all`: than ours on all threads, since
  with more than one spconv returns wrong sums on a CPU.
- `map`: seconds to find all neighbours, once for all layers and steps. `scratch`: MiB beyond the output.
"""

from __future__ import annotations

import argparse
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import harness
import psutil
import torch
import torch.nn.functional as F

from one2345pp.errors import InputError
from one2345pp.models.sparse import SparseGrid
from one2345pp.models.sparse.functional import submanifold_conv3d
from one2345pp.models.sparse.spconv_backend import run_spconv


COLUMNS = {
    "voxels": "{:,}",
    "side": "{}",
    "channels": "{}",
    "seconds": "{:.4f}",
    "ours": "{:.0f}",
    "product": "{:.0f}",
    "share": "{:.0%}",
    "dense": "{:.1f}",
    "spconv": "{:.2f}",
    "spconv_all": "{:.2f}",
    "map": "{:.3f}",
    "scratch": "{:.0f}",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, "threads", "report")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--voxels", type=int, nargs="+", default=[10_000, 50_000, 200_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dense-gib", type=float, default=2.0, help="largest dense grid that is tried")
    args = harness.parse(parser, argv)
    rows = []
    for voxels in args.voxels:
        for channels in args.channels:
            print(f"{voxels:,} voxels, {channels} channels", flush=True)
            rows.append(measure(voxels, channels, args))
    cells = [[form.format(row[name]) if name in row else None for name, form in COLUMNS.items()] for row in rows]
    report = {"torch": torch.__version__, "threads": args.threads, "rows": rows}
    harness.write_report(report, args.output, harness.table(list(COLUMNS), cells))


def shell(voxels: int) -> SparseGrid:
    """About so many voxels: those nearer than 1.5 cells to a sphere."""
    radius = math.sqrt(voxels / (4 * math.pi * 3))
    side = 2 * math.ceil(radius + 2)
    axis = torch.arange(side) + 0.5 - side / 2
    rows = []
    for x, value in enumerate(axis):  # slice by slice: the grid of a million voxels has forty times as many cells
        distance = (value**2 + axis[:, None] ** 2 + axis**2).sqrt()
        yz = ((distance - radius).abs() < 1.5).nonzero()
        rows.append(F.pad(yz, (2, 0)) + torch.tensor([0, x, 0, 0]))
    return SparseGrid(torch.cat(rows), side, 1)


def operands(grid: SparseGrid, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, 3, generator=rng) / math.sqrt(27 * channels)
    return torch.randn(len(grid), channels, generator=rng), weight


@torch.no_grad()
def measure(voxels: int, channels: int, args: argparse.Namespace) -> dict:
    """One row of the table."""
    grid = shell(voxels)
    start = time.perf_counter()
    grid.neighbors  # noqa: B018, built on access
    row = {"voxels": len(grid), "side": grid.resolution, "channels": channels, "map": time.perf_counter() - start}
    features, weight = operands(grid, channels)
    operations = 54 * channels**2

    left, right = torch.randn(8192, 27 * channels), torch.randn(27 * channels, channels)
    product = 8192 * operations / seconds(lambda: left @ right, args.repeats * 3)
    ours = seconds(lambda: submanifold_conv3d(features, weight, None, grid), args.repeats)
    rate = len(grid) * operations / ours
    row |= {"seconds": ours, "ours": rate / 1e9, "product": product / 1e9, "share": rate / product}

    if 3 * grid.resolution**3 * channels * 4 < args.dense_gib * 2**30:
        dense = torch.zeros(1, channels, *[grid.resolution] * 3)
        x, y, z = grid.coords[:, 1:].unbind(1)
        dense[0, :, x, y, z] = features.T
        row["dense"] = seconds(lambda: F.conv3d(dense, weight, padding=1), max(args.repeats // 2, 1)) / ours

    torch.set_num_threads(1)
    try:
        theirs = run_spconv(features, weight, None, grid)
    except ImportError:
        pass  # optional: the column stays empty
    else:
        difference = (theirs - submanifold_conv3d(features, weight, None, grid)).abs().max().item()
        if difference > 1e-3:
            raise InputError(f"spconv: differs from ours by {difference:.1e}, so its time says nothing.")
        single = seconds(lambda: submanifold_conv3d(features, weight, None, grid), args.repeats)
        other = seconds(lambda: run_spconv(features, weight, None, grid), args.repeats)
        row |= {"spconv": other / single, "spconv_all": other / ours}
    torch.set_num_threads(args.threads)
    row["scratch"] = scratch(lambda: submanifold_conv3d(features, weight, None, grid))
    return row


def seconds(work: Callable, repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scratch(work: Callable[[], torch.Tensor]) -> float:
    """MiB by which a call raises the memory of the process beyond its output, read every millisecond beside it."""
    process, done, peak = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = work()
    done.set()
    watcher.join()
    return max(peak - before - output.nbytes, 0) / 2**20


if __name__ == "__main__":
    main()
