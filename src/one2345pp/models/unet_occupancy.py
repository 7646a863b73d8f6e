"""The dense UNet of the first volume stage: it denoises a shell-occupancy grid. The sparse stage's UNet lives in `unet_sparse`.

Axes: B samples, C channels, X Y Z grid, G channels of the global vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .embeddings import ConditionedTimeEmbedding


@dataclass
class OccupancyUNet3DOutput(BaseOutput):
    """Args:
    sample: The clean occupancy as predicted, `[B, 1, X, Y, Z]`, about -1 (empty) to 1 (shell).
    """

    sample: Tensor


class OccupancyResBlock(nn.Module):
    """Two convolutions; time shifts and the global vector scales what lies between. `[B, C_in, X, Y, Z] -> [B, C_out, X, Y, Z]`."""

    def __init__(self, in_channels: int, out_channels: int, global_channels: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(min(groups, in_channels), in_channels)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.time = ConditionedTimeEmbedding(out_channels, global_channels)
        self.norm2 = nn.GroupNorm(min(groups, out_channels), out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        self.skip = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, timestep: Tensor, global_vector: Tensor | None) -> Tensor:
        shift, scale = self.time(timestep, global_vector)
        h = self.conv1(F.silu(self.norm1(x)))
        h = h * scale[..., None, None, None] + shift[..., None, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class VolumeSelfAttention(nn.Module):
    """Attention of every cell to every cell, `[B, C, X, Y, Z] -> [B, C, X, Y, Z]`."""

    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(min(groups, channels), channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).mT  # [B, P, C]
        q, k, v = self.to_qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out(out).mT.unflatten(-1, x.shape[2:])


class OccupancyUNet3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """UNet over a dense grid with a condition pyramid concatenated at every level; predicts the clean grid (x0).

    Args:
        sample_size: Cells along an edge.
        in_channels: Channels of the grid (1: occupancy).
        block_out_channels: Widths, finest level first.
        layers_per_block: Residual blocks a level and direction.
        condition_channels: Channels of the condition pyramid, one number a level; empty for none.
        global_channels: Channels of the global vector; 0 for none.
        attention_levels: Levels (0 is the finest) with self-attention.
        attention_heads: Heads of it.
        self_conditioning: Whether the last prediction is an input, too.
        norm_num_groups: Groups of the norms.
        dropout: Before the second convolution of a block.

    Source: One-2-3-45++ section 3.2; widths and blocks from LAS-Diffusion.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["OccupancyResBlock"]
    _no_split_modules = ["OccupancyResBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 1,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 256, 256),
        layers_per_block: int = 1,
        condition_channels: tuple[int, ...] = (32, 64, 128, 256, 256),
        global_channels: int = 0,
        attention_levels: tuple[int, ...] = (3, 4),
        attention_heads: int = 4,
        self_conditioning: bool = True,
        norm_num_groups: int = 32,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        widths = list(block_out_channels)
        condition = list(condition_channels) or [0] * len(widths)

        def block(c_in: int, c_out: int) -> OccupancyResBlock:
            return OccupancyResBlock(c_in, c_out, global_channels, norm_num_groups, dropout)

        def attention(level: int) -> nn.Module:
            wanted = level in attention_levels
            return VolumeSelfAttention(widths[level], attention_heads, norm_num_groups) if wanted else nn.Identity()

        self.conv_in = nn.Conv3d(in_channels * (2 if self_conditioning else 1), widths[0], 3, padding=1)
        self.down_blocks, self.down_attention, self.downsample = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            first = block(width + condition[level], width)
            self.down_blocks.append(nn.ModuleList([first, *(block(width, width) for _ in range(layers_per_block - 1))]))
            self.down_attention.append(attention(level))
            if level + 1 < len(widths):
                self.downsample.append(nn.Conv3d(width, widths[level + 1], 2, stride=2))
        self.mid_block = block(widths[-1], widths[-1])
        self.upsample, self.up_blocks, self.up_attention = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths) - 1)):
            self.upsample.append(nn.ConvTranspose3d(widths[level + 1], widths[level], 2, stride=2))
            first = block(2 * widths[level], widths[level])
            self.up_blocks.append(
                nn.ModuleList([first, *(block(widths[level], widths[level]) for _ in range(layers_per_block - 1))])
            )
            self.up_attention.append(attention(level))
        self.norm_out = nn.GroupNorm(min(norm_num_groups, widths[0]), widths[0])
        self.conv_out = nn.Conv3d(widths[0], in_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,  # [B, C, X, Y, Z]
        timestep: Tensor | float | int,
        condition: list[Tensor] | None = None,
        global_vector: Tensor | None = None,
        self_condition: Tensor | None = None,
        return_dict: bool = True,
    ) -> OccupancyUNet3DOutput | tuple[Tensor]:
        """
        Args:
            sample: Noisy grid, `[B, C, X, Y, Z]`.
            timestep: Diffusers timesteps in [0, 1000), `[B]` or one number.
            condition: The pyramid of `ConditionEncoder`, `[B, C_l, X_l, Y_l, Z_l]` a level; `None` for no condition (zeros).
            global_vector: `[B, G]`, or `None`.
            self_condition: The last prediction, like `sample`; `None` for none yet (zeros).
            return_dict: Whether to return an `OccupancyUNet3DOutput` or a tuple.

        Returns:
            The estimate of the clean sample, like `sample`.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        if self.config.self_conditioning:
            sample = torch.cat([sample, torch.zeros_like(sample) if self_condition is None else self_condition], 1)
        h = self.conv_in(
            sample.contiguous(memory_format=torch.channels_last_3d)
        )  # twice as fast on a CPU at the finest level
        skips = []
        for level, blocks in enumerate(self.down_blocks):
            h = torch.cat([h, *self._level_condition(condition, level, h)], 1)
            for block in blocks:
                h = self._run(block, h, timestep, global_vector)
            h = self.down_attention[level](h)
            skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
        h = self._run(self.mid_block, h, timestep, global_vector)
        skips.pop()
        for upsample, blocks, attention in zip(self.upsample, self.up_blocks, self.up_attention, strict=True):
            h = torch.cat([upsample(h), skips.pop()], 1)
            for block in blocks:
                h = self._run(block, h, timestep, global_vector)
            h = attention(h)
        out = self.conv_out(F.silu(self.norm_out(h)))
        return OccupancyUNet3DOutput(out) if return_dict else (out,)

    def _level_condition(self, condition: list[Tensor] | None, level: int, h: Tensor) -> list[Tensor]:
        if not self.config.condition_channels:
            return []
        if condition is None:
            return [h.new_zeros(len(h), self.config.condition_channels[level], *h.shape[2:])]
        return [condition[level].to(h.dtype)]

    def _run(self, block: nn.Module, *args) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
