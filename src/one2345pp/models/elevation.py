"""From how high a picture looks at its object, told by the picture alone. Not of the paper; what it is for: the chain's pipeline."""

# B pictures, S pixels, N bins

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..errors import InputError


GRID = 4  # cells along a side that features are averaged in before the last layer


class ElevationEstimator(ModelMixin, ConfigMixin):
    """A small residual network over an RGBA picture of one object, with a probability for each of some elevations.

    Args:
        image_size: Side of the pictures in pixels, a multiple of `GRID` times what the levels shrink it by.
        block_out_channels: Width of each level; every level after the first halves the sides, as the stem does.
        low, high: First and last of the elevations, in degrees above the horizon.
        step: Degrees from one to the next.
        norm_num_groups: Of the group norms.
        dropout: Of the features before the last layer.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        block_out_channels: tuple[int, ...] = (32, 64, 96, 128),
        low: float = -15.0,
        high: float = 45.0,
        step: float = 5.0,
        norm_num_groups: int = 8,
        dropout: float = 0.3,
    ):
        super().__init__()
        if image_size % (smallest := GRID * 2 ** len(block_out_channels)):
            raise InputError(
                f"image_size: got {image_size}, expected a multiple of {smallest} for {len(block_out_channels)} levels."
            )
        widths = [block_out_channels[0], *block_out_channels]
        self.conv_in = nn.Conv2d(4, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            _Block(before, after, 1 if level == 0 else 2, norm_num_groups)
            for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.blocks.append(_Block(widths[-1], widths[-1], 1, norm_num_groups))
        self.norm_out = nn.GroupNorm(norm_num_groups, widths[-1])
        self.drop = nn.Dropout(dropout)
        self.proj_out = nn.Linear(widths[-1] * GRID**2, round((high - low) / step) + 1)

    @property
    def bins(self) -> Tensor:
        """The elevations, `[N]` degrees."""
        return self.config.low + self.config.step * torch.arange(self.proj_out.out_features)

    def forward(
        self,
        pictures: Tensor,  # [B, 4, S, S] straight alpha in [0, 1], the object framed
    ) -> Tensor:
        """Logits of the elevations, `[B, N]`."""
        alpha = pictures[:, 3:]
        x = torch.cat([(2 * pictures[:, :3] - 1) * alpha, 2 * alpha - 1], 1)  # what is transparent has no colour
        x = self.conv_in(x.to(self.dtype))
        for block in self.blocks:
            x = block(x)
        cells = F.silu(self.norm_out(x)).unflatten(3, (GRID, -1)).unflatten(2, (GRID, -1))  # [B, C, GRID, h, GRID, w]
        return self.proj_out(self.drop(cells.mean((3, 5)).flatten(1)))

    def estimate(
        self,
        pictures: Tensor,  # [B, 4, S, S] straight alpha in [0, 1], the object framed
    ) -> Tensor:
        """The expected elevation, `[B]` degrees, which has the smallest squared error; where a picture leaves it open, that is the
        middle of what is usual."""
        probabilities = self(pictures).float().softmax(-1)
        return probabilities @ self.bins.to(probabilities)

    def targets(
        self,
        elevations: Tensor,  # [B] degrees
    ) -> Tensor:
        """Probabilities with these expected elevations, each on its two nearest bins, `[B, N]`; beyond the bins, on the last."""
        elevations = elevations.clamp(self.config.low, self.config.high)
        distance = (elevations[:, None] - self.bins.to(elevations)).abs() / self.config.step
        return (1 - distance).clamp(min=0)


class _Block(nn.Module):
    """Two convolutions beside a skip connection, normalised before each."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return (self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))) / math.sqrt(2)
