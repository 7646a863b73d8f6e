"""Values on some cells of a grid to values on all of them: the harmonic extension. What is done with its signs lives in `extract`.

Axes: X Y Z grid.
"""

from __future__ import annotations

import numpy as np


LEAK = 0.02  # pull of `far` on a cell at the border, as a share of a neighbour's
SWEEPS, COARSEST_SWEEPS = 40, 100


def harmonic_extension(
    values: np.ndarray,  # [X, Y, Z]
    known: np.ndarray,  # [X, Y, Z] bool
    far: float,
) -> np.ndarray:
    """The smoothest function that takes `values` where they are `known`: elsewhere each cell is the mean of its neighbours.

    Of a signed distance known near parts of a surface, it tells inside from outside everywhere, and its zero level closes
    gaps and holes of any width with a membrane. The border is free but for a slight pull towards `far`, so that an object
    cut off by the grid stays an object, and a cell without any context is outside.

    Returns:
        `[X, Y, Z]` float32; `values` where they are known.

    Source: J. Davis et al., "Filling holes in complex surfaces using volumetric diffusion", 2002; solved coarse to fine.
    """
    pad = [(0, -size % 8) for size in known.shape]
    extended = _solve(np.pad(values.astype(np.float32), pad), np.pad(known, pad), far, LEAK)
    return extended[tuple(slice(size) for size in known.shape)]


def _solve(values: np.ndarray, known: np.ndarray, far: float, leak: float) -> np.ndarray:
    if min(known.shape) <= 4 or any(size % 2 for size in known.shape):
        return _relax(np.full(known.shape, far, np.float32), values, known, far, leak, COARSEST_SWEEPS)
    counts = _pooled(known.astype(np.float32))
    means = _pooled(np.where(known, values, 0)) / np.maximum(counts, 1)
    coarse = _solve(means, counts > 0, far, 2 * leak)  # twice as few cells hold on to twice as long a border
    start = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    return _relax(start, values, known, far, leak, SWEEPS)


def _pooled(grid: np.ndarray) -> np.ndarray:
    """Sums over blocks of two cells a side."""
    x, y, z = (size // 2 for size in grid.shape)
    return grid.reshape(x, 2, y, 2, z, 2).sum((1, 3, 5))


def _relax(
    start: np.ndarray, values: np.ndarray, known: np.ndarray, far: float, leak: float, sweeps: int
) -> np.ndarray:
    """Jacobi sweeps of Laplace's equation, in place on a grid with a border of one cell."""
    grid = np.pad(np.where(known, values, start), 1)
    cells, unknown = grid[1:-1, 1:-1, 1:-1], ~known
    total = np.empty_like(cells)
    for _ in range(sweeps):
        for axis in range(3):
            sides = np.moveaxis(grid, axis, 0)  # a view
            for border, inner in ((0, 1), (-1, -2)):
                sides[border] = (1 - leak) * sides[inner] + leak * far
        np.add(grid[:-2, 1:-1, 1:-1], grid[2:, 1:-1, 1:-1], out=total)
        for neighbor in (grid[1:-1, :-2, 1:-1], grid[1:-1, 2:, 1:-1], grid[1:-1, 1:-1, :-2], grid[1:-1, 1:-1, 2:]):
            total += neighbor
        total /= 6
        np.copyto(cells, total, where=unknown)
    return cells
