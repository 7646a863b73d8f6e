"""The UNet of the second diffusion: signed distance and colour on sparse voxels. Its condition pyramid is made elsewhere.

Axes: N active voxels (N_l on level l), B samples, V views, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..errors import InputError
from .embeddings import ConditionedTimeEmbedding
from .sparse import (
    SparseConv3d,
    SparseDownConv3d,
    SparseGrid,
    SparseGroupNorm,
    SparseUpConv3d,
    set_sparse_backend,
)
from .sparse.functional import group_norm


class ProjectedPixels(NamedTuple):
    """What each view shows at each voxel's projection.

    Args:
        colors: sRGB in [-1, 1], `[N, V, 3]`.
        directions: Unit vectors from the voxel to the camera, in the world, `[N, V, 3]`.
        valid: 0 where the projection misses the image or the object's mask, up to 1, `[N, V]`.
    """

    colors: Tensor
    directions: Tensor
    valid: Tensor


@dataclass
class SparseUNet3DOutput(BaseOutput):
    """Args:
    sample: `[N, out_channels]`, in the order of the input's rows.
    """

    sample: Tensor


class SparseUNet3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """UNet over sparse voxels, conditioned on a feature pyramid, a global vector and projected pixel colours.

    Args:
        sample_size: Voxels along an edge, for coordinates that come as a plain tensor.
        in_channels: Channels of the noisy sample: signed distance and RGB.
        out_channels: Channels of the prediction; the last three are the colour.
        block_out_channels: Width of each level, finest first; each level halves the resolution.
        layers_per_block: Residual blocks of each level on the way down, and on the way up.
        condition_channels: Channels of the condition pyramid at each level, concatenated with that level's features; empty for none.
        global_channels: Channels of the global vector; 0 for none.
        pixel_channels: Width of the head that blends projected pixel colours into the last layer; 0 for none.
        norm_num_groups: Largest number of groups in a norm; each group has at least two channels.
        dropout: Dropout in the residual blocks.

    Source: One-2-3-45++ section 3.2; block layout after LAS-Diffusion.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SparseResBlock"]
    _repeated_blocks = ["SparseResBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 256, 256),
        layers_per_block: int = 1,
        condition_channels: tuple[int, ...] = (),
        global_channels: int = 0,
        pixel_channels: int = 0,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        widths = list(block_out_channels)
        conditions = list(condition_channels) or [0] * len(widths)
        if len(conditions) != len(widths):
            raise InputError(
                f"condition_channels: got {len(conditions)} levels, expected {len(widths)}, as in block_out_channels."
            )

        def blocks(in_width: int, out_width: int) -> nn.ModuleList:
            ins = [in_width] + [out_width] * (layers_per_block - 1)
            return nn.ModuleList(SparseResBlock(i, out_width, global_channels, norm_num_groups, dropout) for i in ins)

        self.conv_in = SparseConv3d(in_channels, widths[0])
        self.down_blocks = nn.ModuleList(blocks(width + c, width) for width, c in zip(widths, conditions, strict=True))
        self.downsamplers = nn.ModuleList(SparseDownConv3d(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.mid_block = SparseResBlock(widths[-1], widths[-1], global_channels, norm_num_groups, dropout)
        self.upsamplers = nn.ModuleList(SparseUpConv3d(b, a) for a, b in zip(widths, widths[1:], strict=False))
        self.up_blocks = nn.ModuleList(blocks(2 * width, width) for width in widths[:-1])
        self.norm_out = SparseGroupNorm(_num_groups(norm_num_groups, widths[0]), widths[0])
        self.pixel_blend = PixelBlend(widths[0], pixel_channels) if pixel_channels else None
        self.proj_out = nn.Linear(widths[0] + (3 if pixel_channels else 0), out_channels)
        nn.init.zeros_(self.proj_out.weight)  # the prediction starts at the mean: zero, and the blended colour
        nn.init.zeros_(self.proj_out.bias)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: Tensor,  # [N, in_channels]
        timestep: Tensor | float | int,
        grid: SparseGrid | Tensor,
        condition: list[Tensor] | None = None,
        global_vector: Tensor | None = None,
        pixels: ProjectedPixels | None = None,
        return_dict: bool = True,
    ) -> SparseUNet3DOutput | tuple[Tensor]:
        """
        Args:
            sample: Noisy features, `[N, in_channels]`.
            timestep: Diffusers timesteps in [0, 1000), `[B]` or one for all.
            grid: The voxels of `sample`; made once and passed to every step, it keeps its maps. A plain tensor `[N, 4]` of
                `(sample, x, y, z)` works too, at the price of building them each time.
            condition: One tensor `[N_l, C_l]` a level, rows as in `grid.levels(...)`; `None` for no condition (zeros).
            global_vector: `[B, global_channels]`, or `None`.
            pixels: Projected pixels; `None` for none (a voxel that no view sees).
            return_dict: Return a `SparseUNet3DOutput` instead of a tuple.

        Returns:
            The prediction, `[N, out_channels]`.
        """
        timestep = torch.as_tensor(timestep, device=sample.device)
        if isinstance(grid, Tensor):
            grid = SparseGrid(grid, self.config.sample_size, timestep.numel() if timestep.numel() > 1 else None)
        timestep = timestep.expand(grid.batch_size)
        levels = grid.levels(len(self.config.block_out_channels))
        self._check_inputs(sample, levels, condition, pixels)
        if condition is None:
            channels = self.config.condition_channels
            condition = [sample.new_zeros(len(level), c) for level, c in zip(levels, channels, strict=False)]

        # 1. Down
        hidden = self.conv_in(sample, grid)
        skips = []
        for index, (blocks, level) in enumerate(zip(self.down_blocks, levels, strict=True)):
            if index:
                hidden = self.downsamplers[index - 1](hidden, levels[index - 1])
            if condition:
                hidden = torch.cat([hidden, condition[index].to(hidden.dtype)], 1)
            hidden = self._run(blocks, hidden, timestep, global_vector, level)
            skips.append(hidden)

        # 2. Middle
        hidden = self._run([self.mid_block], hidden, timestep, global_vector, levels[-1])

        # 3. Up
        for index in reversed(range(len(self.up_blocks))):
            hidden = self.upsamplers[index](hidden, levels[index])
            hidden = torch.cat([hidden, skips[index]], 1)
            hidden = self._run(self.up_blocks[index], hidden, timestep, global_vector, levels[index])

        # 4. Out
        hidden = F.silu(self.norm_out(hidden, grid))
        output = self._project_out(hidden, pixels)
        return SparseUNet3DOutput(output) if return_dict else (output,)

    def set_sparse_backend(self, name: str) -> None:
        """`"torch"` (the default, anywhere) or `"spconv"` (CUDA): what computes the convolutions; see `models.sparse`."""
        set_sparse_backend(self, name)

    def _check_inputs(self, sample, levels, condition, pixels) -> None:
        if len(sample) != len(levels[0]):
            raise InputError(
                f"sample: got {len(sample)} rows for {len(levels[0])} voxels. Pass one row for each voxel."
            )
        if condition is not None:
            got = [tuple(features.shape) for features in condition]
            expected = [(len(level), c) for level, c in zip(levels, self.config.condition_channels, strict=False)]
            if got != expected:
                raise InputError(
                    f"condition: got {got}, expected {expected}: a [N_l, C_l] for each of condition_channels."
                )
        if pixels is not None and self.pixel_blend is None:
            raise InputError("pixels: this model takes none. Build it with pixel_channels, or pass None.")

    def _run(self, blocks, hidden, timestep, global_vector, level) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, hidden, timestep, global_vector, level)
            else:
                hidden = block(hidden, timestep, global_vector, level)
        return hidden

    def _project_out(self, hidden: Tensor, pixels: ProjectedPixels | None) -> Tensor:
        if self.pixel_blend is None:
            return self.proj_out(hidden)
        blended = hidden.new_zeros(len(hidden), 3) if pixels is None else self.pixel_blend(hidden, *pixels)
        output = self.proj_out(torch.cat([hidden, blended], 1))
        return output + F.pad(blended, (output.shape[1] - 3, 0))  # the colour is the blend and a correction of it


class SparseResBlock(nn.Module):
    """Two sparse convolutions around a residual; time and global vector scale and shift the second norm's output.

    Args:
        in_channels, out_channels: Widths.
        global_channels: Channels of the global vector; 0 for none.
        norm_num_groups: Largest number of groups.
        dropout: Before the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, global_channels: int, norm_num_groups: int, dropout: float):
        super().__init__()
        self.norm1 = SparseGroupNorm(_num_groups(norm_num_groups, in_channels), in_channels)
        self.conv1 = SparseConv3d(in_channels, out_channels)
        self.time = ConditionedTimeEmbedding(out_channels, global_channels)
        self.norm2 = SparseGroupNorm(_num_groups(norm_num_groups, out_channels), out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = SparseConv3d(out_channels, out_channels)
        self.shortcut = nn.Linear(in_channels, out_channels) if in_channels != out_channels else None
        nn.init.zeros_(self.conv2.weight)  # a new block is its shortcut
        nn.init.zeros_(self.conv2.bias)

    def forward(self, hidden: Tensor, timestep: Tensor, global_vector: Tensor | None, grid: SparseGrid) -> Tensor:
        """`[N, C_in] -> [N, C_out]`; `timestep [B]`, `global_vector [B, G]`."""
        residual = self.conv1(F.silu(self.norm1(hidden, grid)), grid)
        shift, scale = self.time(timestep, global_vector)
        norm = self.norm2  # its scale and shift joined with those of the time: one pass over the voxels
        residual = group_norm(residual, norm.num_groups, norm.weight * scale, norm.bias * scale + shift, grid, norm.eps)
        residual = self.conv2(self.dropout(F.silu(residual)), grid)
        if self.shortcut is not None:
            hidden = self.shortcut(hidden)
        return hidden + residual


class PixelBlend(nn.Module):
    """A colour for each voxel: projected pixel colours, weighted over the views by what the voxel and each view know.

    Args:
        channels: Channels of the voxel's features.
        hidden_channels: Width of the weights' MLP.
    """

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.voxel = nn.Linear(channels, hidden_channels)
        self.view = nn.Linear(7, hidden_channels, bias=False)
        self.logit = nn.Linear(hidden_channels, 1)

    def forward(self, hidden: Tensor, colors: Tensor, directions: Tensor, valid: Tensor) -> Tensor:
        """`hidden [N, C]`, pixels as in `ProjectedPixels`; returns `[N, 3]`, tending to zero where no view is valid."""
        colors, directions, valid = (pixels.to(hidden.dtype) for pixels in (colors, directions, valid))
        seen = self.view(torch.cat([colors, directions, valid[..., None]], -1))
        logits = self.logit(F.silu(self.voxel(hidden)[:, None] + seen))[..., 0]
        weights = (logits.float() + valid.float().clamp(min=1e-6).log()).softmax(1)  # softmax of the views, times valid
        weights = (weights * valid.amax(1, keepdim=True)).to(hidden.dtype)
        return (weights[..., None] * colors).sum(1)


def _num_groups(most: int, channels: int) -> int:
    """The largest divisor of `channels` up to `most` that leaves each group two channels: one alone would lose its mean."""
    return max(groups for groups in range(1, max(1, min(most, channels // 2)) + 1) if channels % groups == 0)
