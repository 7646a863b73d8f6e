"""The time embedding that both 3D UNets use. Camera and voxel conditions live in `condition_encoder`.

Axes: B samples, C channels, G channels of the global vector.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from ..errors import InputError


class ConditionedTimeEmbedding(nn.Module):
    """Shift and scale of a block's features from the time and, where there is one, a global vector.

    `h * scale + shift` with `shift = mlp(t)` and `scale = 1 + mlp(c)`. The last layer of `mlp(c)` starts at zero, so a new
    vector starts without effect.

    Args:
        channels: Channels of the features.
        global_channels: Channels of the global vector (a CLIP image embedding); 0 for none.
        num_frequencies: Sine and cosine pairs of the time.

    Source: LAS-Diffusion (the vector multiplies, the time adds).
    """

    def __init__(self, channels: int, global_channels: int = 0, num_frequencies: int = 32):
        super().__init__()
        self.channels = channels
        self.frequencies = Timesteps(2 * num_frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(2 * num_frequencies, 2 * channels, out_dim=channels)
        self.condition = None
        if global_channels:
            last = nn.Linear(channels, channels)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.condition = nn.Sequential(nn.Linear(global_channels, channels), nn.SiLU(), last)

    def forward(self, timestep: Tensor, global_vector: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            timestep: Diffusers timesteps in [0, 1000), `[B]`.
            global_vector: `[B, G]`, or `None`.

        Returns:
            Shift and scale, each `[B, channels]`.

        Raises:
            InputError: A vector for an embedding that was built without `global_channels`.
        """
        dtype = self.time.linear_1.weight.dtype
        shift = self.time(self.frequencies(timestep).to(dtype))
        if global_vector is None:
            return shift, torch.ones_like(shift)
        if self.condition is None:
            raise InputError("global_vector: this model takes none. Build it with global_channels, or pass None.")
        return shift, 1 + self.condition(global_vector.to(dtype))
