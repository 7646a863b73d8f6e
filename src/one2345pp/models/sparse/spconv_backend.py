"""`functional.submanifold_conv3d` on spconv, for CUDA. Its plain twin is the reference; weights keep the dense layout.

spconv is optional (`pip install one2345pp[cuda]`) and imported when it is first asked for. Never on a CPU: spconv 2.3.8 returns
wrong sums there with more than one thread, and has no backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from .grid import SparseGrid


def check_spconv(device: torch.device) -> None:
    """Raise `InputError` where spconv cannot be used: another device than CUDA, or no package."""
    if device.type != "cuda":
        raise InputError(
            f"spconv: runs on CUDA here, got tensors on {device.type}. "
            "Move the model there, or use set_sparse_backend('torch'), which runs anywhere."
        )
    try:
        import spconv.pytorch  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"spconv: cannot be imported ({error}). Install it with: pip install 'one2345pp[cuda]'."
        ) from None


def submanifold_conv3d(features: Tensor, weight: Tensor, bias: Tensor | None, grid: SparseGrid) -> Tensor:
    """As `functional.submanifold_conv3d`. The pairs of neighbours are spconv's own and stay on the grid beside our map."""
    check_spconv(features.device)
    return run_spconv(features, weight, bias, grid)


def run_spconv(features: Tensor, weight: Tensor, bias: Tensor | None, grid: SparseGrid) -> Tensor:
    """The product alone, on any device: `benchmarks/sparse.py` times it on one thread of a CPU."""
    from spconv.core import ConvAlgo
    from spconv.pytorch import functional, ops

    if "spconv" not in grid.backend_maps:
        one = [1, 1, 1]
        side = [grid.resolution] * 3
        _, pairs, counts = ops.get_indice_pairs(
            grid.coords.int(), grid.batch_size, side, ConvAlgo.Native, [3, 3, 3], one, one, one, [0, 0, 0], subm=True
        )
        grid.backend_maps["spconv"] = pairs, counts
    filters = weight.permute(0, 2, 3, 4, 1).contiguous()  # spconv has the input channels last
    out = functional.indice_subm_conv(features, filters, *grid.backend_maps["spconv"], len(grid), ConvAlgo.Native)
    return out if bias is None else out + bias
