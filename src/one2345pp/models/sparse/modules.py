"""Layers over `functional`: parameters and their first values. Weights are stored as the dense twin of each layer stores them.

Every layer takes features and the grid; blocks and networks live elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...errors import InputError
from . import functional, spconv_backend
from .grid import SparseGrid


BACKENDS = {"torch": functional.submanifold_conv3d, "spconv": spconv_backend.submanifold_conv3d}


def set_sparse_backend(model: nn.Module, name: str) -> None:
    """Choose what computes the convolutions of size 3 of a model; all other layers are matrix products already.

    Args:
        model: Holds `SparseConv3d` layers, on the device that it will run on.
        name: `"torch"`, which runs anywhere, or `"spconv"`, on CUDA where it is installed.

    Raises:
        InputError: If there is no backend of that name, or it cannot run here.
    """
    if name not in BACKENDS:
        raise InputError(f"sparse backend: got {name!r}, expected one of {', '.join(BACKENDS)}.")
    if name == "spconv":
        spconv_backend.check_spconv(next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, SparseConv3d):
            module.backend = name


class _SparseConv(nn.Module):
    """Weight and bias, first drawn as `torch.nn.Conv3d` draws them."""

    def __init__(self, weight_shape: tuple[int, ...], out_channels: int, fan_in: int, bias: bool):
        super().__init__()
        bound = 1 / math.sqrt(fan_in)
        self.weight = nn.Parameter(torch.zeros(weight_shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_channels).uniform_(-bound, bound)) if bias else None


class SparseConv3d(_SparseConv):
    """`functional.submanifold_conv3d`: `[N, C_in] -> [N, C_out]`, kernel 3. `set_sparse_backend` says what computes it."""

    backend = "torch"

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__((out_channels, in_channels, 3, 3, 3), out_channels, 27 * in_channels, bias)

    def forward(self, features: Tensor, grid: SparseGrid) -> Tensor:
        return BACKENDS[self.backend](features, self.weight, self.bias, grid)


class SparseDownConv3d(_SparseConv):
    """`functional.down_conv3d`: `[N, C_in]` on `grid` to `[M, C_out]` on `grid.coarser`, kernel 2, stride 2."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__((out_channels, in_channels, 2, 2, 2), out_channels, 8 * in_channels, bias)

    def forward(self, features: Tensor, grid: SparseGrid) -> Tensor:
        return functional.down_conv3d(features, self.weight, self.bias, grid)


class SparseUpConv3d(_SparseConv):
    """`functional.up_conv3d`: `[M, C_in]` on `grid.coarser` to `[N, C_out]` on `grid`, kernel 2, stride 2."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        # one kernel cell reaches a voxel, so the fan-in is one cell's
        super().__init__((in_channels, out_channels, 2, 2, 2), out_channels, in_channels, bias)

    def forward(self, features: Tensor, grid: SparseGrid) -> Tensor:
        return functional.up_conv3d(features, self.weight, self.bias, grid)


class SparseGroupNorm(nn.Module):
    """`functional.group_norm` with a learned scale and shift: `[N, C] -> [N, C]`."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5):
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, features: Tensor, grid: SparseGrid) -> Tensor:
        return functional.group_norm(features, self.num_groups, self.weight, self.bias, grid, self.eps)
