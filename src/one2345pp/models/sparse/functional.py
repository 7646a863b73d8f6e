"""Sparse convolutions and norms as functions of features and a grid. Parameters live in `modules`.

Axes: N active voxels, M active voxels on the next coarser level, B samples, C channels. Weights are those of the dense twin.
Every sum has a fixed order (gathers and matrix products, no atomic adds), so results repeat bit for bit on one machine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .grid import SparseGrid


CHUNK_ROWS = 1024  # voxels a product on a CPU: the gathered rows stay in cache
CHUNK_ELEMENTS = 2**26  # gathered elements a product elsewhere: bounds memory, few launches


def submanifold_conv3d(features: Tensor, weight: Tensor, bias: Tensor | None, grid: SparseGrid) -> Tensor:
    """Convolution of size 3 that reads and writes active voxels only.

    Args:
        features: `[N, C_in]`.
        weight: `[C_out, C_in, 3, 3, 3]`, as in `torch.nn.functional.conv3d` over axes x, y, z with padding 1.
        bias: `[C_out]` or `None`.
        grid: The voxels.

    Returns:
        `[N, C_out]`: the dense convolution of the scattered features, read at the active voxels.

    Source: submanifold sparse convolution, Graham et al., CVPR 2018.
    """
    features, weight, bias = _in_autocast_dtype(features, weight, bias)
    out = _SubmanifoldConv.apply(features, weight, grid.neighbors)
    return out if bias is None else out + bias


def down_conv3d(features: Tensor, weight: Tensor, bias: Tensor | None, grid: SparseGrid) -> Tensor:
    """Convolution of size 2 and stride 2 onto the parents of the active voxels.

    Args:
        features: `[N, C_in]`.
        weight: `[C_out, C_in, 2, 2, 2]`, as in `torch.nn.functional.conv3d`.
        bias: `[C_out]` or `None`.
        grid: The fine voxels.

    Returns:
        `[M, C_out]` on `grid.coarser`.
    """
    features, weight, bias = _in_autocast_dtype(features, weight, bias)
    gathered = _Gather.apply(features, grid.children.view(-1), grid.slots[:, None])
    return F.linear(gathered.view(-1, 8 * features.shape[1]), _as_matrix(weight).mT, bias)


def up_conv3d(features: Tensor, weight: Tensor, bias: Tensor | None, grid: SparseGrid) -> Tensor:
    """Transposed convolution of size 2 and stride 2 from the parents to known voxels.

    Args:
        features: `[M, C_in]` on `grid.coarser`.
        weight: `[C_in, C_out, 2, 2, 2]`, as in `torch.nn.functional.conv_transpose3d`.
        bias: `[C_out]` or `None`.
        grid: The fine voxels.

    Returns:
        `[N, C_out]`.
    """
    features, weight, bias = _in_autocast_dtype(features, weight, bias)
    expanded = features @ weight.permute(0, 2, 3, 4, 1).flatten(1)  # [M, 8 * C_out]
    out = _Gather.apply(expanded.view(-1, weight.shape[1]), grid.slots, grid.children.view(-1, 1))
    return out if bias is None else out + bias


def group_norm(
    features: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, grid: SparseGrid, eps: float = 1e-5
) -> Tensor:
    """Group norm over the active voxels of each sample.

    Args:
        features: `[N, C]`.
        num_groups: Groups of neighbouring channels; divides `C`.
        weight: `[C]`, or `[B, C]` for a scale of each sample's own, or `None`.
        bias: As `weight`.
        grid: The voxels.
        eps: Added to the variance.

    Returns:
        `[N, C]` in the dtype of `features`; statistics are float32.
    """
    # the statistics are matrix products, which autocast would round
    with torch.autocast(features.device.type, enabled=False):
        centered = features.float() - grid.spread(_mean_of_groups(grid.mean(features), num_groups))
        variance = _mean_of_groups(grid.mean(centered.square()), num_groups)
        scale = (variance + eps).rsqrt()
        scale = scale if weight is None else scale * weight.float()
        out = centered * grid.spread(scale)
        if bias is not None:
            out = out + (grid.spread(bias.float()) if bias.ndim == 2 else bias.float())
        return out.to(features.dtype)


def _mean_of_groups(values: Tensor, num_groups: int) -> Tensor:
    """Mean over each group's channels, repeated for each of them, `[B, C]`."""
    grouped = values.view(len(values), num_groups, -1)
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def _in_autocast_dtype(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does for torch's own convolutions; it does not reach into a custom function."""
    device = features.device.type
    if not torch.is_autocast_enabled(device):
        return features, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _as_matrix(weight: Tensor) -> Tensor:
    """`[C_out, C_in, k, k, k]` as `[k^3 * C_in, C_out]`."""
    return weight.permute(2, 3, 4, 1, 0).reshape(-1, weight.shape[0])


def _with_zero_row(features: Tensor) -> Tensor:
    """Row `N` is what missing voxels read."""
    return torch.cat([features, features.new_zeros(1, features.shape[1])])


class _SubmanifoldConv(torch.autograd.Function):
    """A gather of neighbours and one matrix product a chunk; the backward pass gathers again instead of keeping anything."""

    @staticmethod
    def forward(ctx, features, weight, neighbors):
        ctx.save_for_backward(features, weight, neighbors)
        return _conv_chunks(features, weight, neighbors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight, neighbors = ctx.saved_tensors
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            # q is p's neighbour at offset o exactly when p is q's at -o: the adjoint is the flipped, transposed kernel
            grad_features = _conv_chunks(grad, weight.flip(2, 3, 4).transpose(0, 1), neighbors)
        if ctx.needs_input_grad[1]:
            total = torch.zeros(27 * weight.shape[1], weight.shape[0], device=grad.device)  # float32 for every dtype
            for rows, gathered in _gathered_chunks(features, neighbors):
                total += gathered.mT @ grad[rows]
            grad_weight = total.view(3, 3, 3, weight.shape[1], -1).permute(4, 3, 0, 1, 2).to(weight.dtype)
        return grad_features, grad_weight, None


def _conv_chunks(features: Tensor, weight: Tensor, neighbors: Tensor) -> Tensor:
    matrix = _as_matrix(weight)
    out = features.new_empty(len(features), matrix.shape[1])
    for rows, gathered in _gathered_chunks(features, neighbors):
        torch.mm(gathered, matrix, out=out[rows])
    return out


def _gathered_chunks(features: Tensor, neighbors: Tensor):
    """Yield slices of rows and their neighbours' features `[n, 27 * C]`, in a buffer that the next chunk overwrites."""
    channels = features.shape[1]
    size = CHUNK_ROWS if features.device.type == "cpu" else max(CHUNK_ROWS, CHUNK_ELEMENTS // (27 * channels))
    padded = _with_zero_row(features)
    buffer = features.new_empty(27 * min(size, len(features)), channels)
    for start in range(0, len(features), size):
        index = neighbors[start : start + size].reshape(-1)
        gathered = torch.index_select(padded, 0, index, out=buffer[: len(index)])
        yield slice(start, start + size), gathered.view(-1, 27 * channels)


class _Gather(torch.autograd.Function):
    """`features[index]`, zeros for missing rows. `inverse [N, k]` lists the outputs that read each row: the adjoint gathers too."""

    @staticmethod
    def forward(ctx, features, index, inverse):
        ctx.save_for_backward(inverse)
        return _with_zero_row(features).index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        gathered = _with_zero_row(grad).index_select(0, inverse.reshape(-1))
        return gathered.view(*inverse.shape, grad.shape[1]).sum(1), None, None
