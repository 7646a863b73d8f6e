"""Reference attention: a stock UNet2DConditionModel that also attends to the tokens of a reference image.

Two passes over one UNet, no parameters of its own. Noising, guidance and the sampling loop live in the pipeline.
"""

# B samples, N tokens of the sample, M tokens of the reference, C channels

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import Tensor

from ..errors import InputError


POSITION_SCALE = 0.5  # against tokens of unit variance


class ReferenceAttention:
    """The write and read passes of one UNet, usable inside `reference_attention`.

    Gradients flow through both passes. Gradient checkpointing does not fit: it repeats the write pass after the mode has changed.
    """

    def __init__(self, unet: UNet2DConditionModel, tile: tuple[int, int] | None = None):
        self._unet = unet
        self._tile = tile  # rows and columns of views in the sample
        self._positions: dict[tuple, Tensor] = {}
        self._size = (1, 1)  # of the latents of the running pass
        self.mode = "read"
        self.tokens: dict[str, Tensor] = {}  # what each self-attention saw of the reference, [B, M, C]

    def write(self, reference: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs) -> None:
        """Run the UNet on the noised reference latents `[B, c, h, w]` and keep the input tokens of every self-attention."""
        self.tokens.clear()
        self.mode, self._size = "write", tuple(reference.shape[-2:])
        self._unet(reference, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False, **kwargs)

    @property
    def samples(self) -> int:
        """How many references' tokens are kept."""
        return len(next(iter(self.tokens.values()), ()))

    def read(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs) -> Tensor:
        """Run the UNet on `sample [B, c, H, W]`; keys and values come from its own tokens and the kept ones, of
        which there may be more than `B`: the last are used.

        Returns:
            The UNet's prediction, `[B, c, H, W]`.
        """
        self.mode, self._size = "read", tuple(sample.shape[-2:])
        return self._unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False, **kwargs)[0]

    def place(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, C]` of the running pass with their places added, if the views' places in the tile were given."""
        if self._tile is None:
            return tokens
        height, width = self._size
        stride = math.sqrt(height * width / tokens.shape[1])
        grid = (round(height / stride), round(width / stride))
        key = (self.mode, grid, tokens.shape[-1], tokens.device, tokens.dtype)
        if key not in self._positions:
            tile = self._tile if self.mode == "read" else None
            self._positions[key] = tile_positions(grid, tokens.shape[-1], tile).to(tokens)
        return tokens + self._positions[key]


def tile_positions(grid: tuple[int, int], channels: int, tile: tuple[int, int] | None) -> Tensor:
    """Where each token of a grid lies: within its view, and which view of the tile that is.

    A deep UNet learns this from the padding of its convolutions; in a small one it does not reach the middle of the tile.

    Args:
        grid: Tokens down and across.
        channels: `C`; a quarter each for the height and width in the view, and the view's row and column.
        tile: Views down and across; `None` for the reference, a single picture that is no view of the tile.

    Returns:
        `[N, C]`, sines and cosines of amplitude `POSITION_SCALE`; the second half is 0 for the reference.
    """
    rows, columns = tile or (1, 1)
    quarter = channels // 4
    octaves = 2.0 ** torch.arange(quarter // 2).remainder(4)  # half a turn to four turns across a view

    def waves(values: Tensor) -> Tensor:
        angles = math.pi * values[..., None] * octaves
        return torch.cat([angles.sin(), angles.cos()], -1)

    y, x = ((torch.arange(n) + 0.5) / n * views for n, views in zip(grid, (rows, columns), strict=True))
    y, x = torch.meshgrid(y, x, indexing="ij")
    parts = [waves(y % 1), waves(x % 1)]
    if tile is not None:
        parts += [waves(y.floor() / rows), waves(x.floor() / columns)]
    places = torch.zeros(*y.shape, channels)
    encoded = torch.cat(parts, -1)
    places[..., : encoded.shape[-1]] = POSITION_SCALE * encoded
    return places.flatten(0, 1)


class ReferenceAttnProcessor:
    """A self-attention processor that stores its tokens (write), or lets another one attend to the stored ones too (read)."""

    def __init__(self, name: str, inner, passes: ReferenceAttention):
        self.name, self.inner, self.passes = name, inner, passes

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None) -> Tensor:
        hidden_states = self.passes.place(hidden_states)
        context = hidden_states  # [B, N, C]
        if self.passes.mode == "write":
            self.passes.tokens[self.name] = hidden_states
        else:
            tokens = self.passes.tokens[self.name][-len(hidden_states) :]
            context = torch.cat([hidden_states, tokens], dim=1)  # [B, N + M, C]
        return self.inner(attn, hidden_states, context, attention_mask)


@contextmanager
def reference_attention(
    unet: UNet2DConditionModel, tile: tuple[int, int] | None = None
) -> Iterator[ReferenceAttention]:
    """Install reference attention in `unet` for the block, and put its own attention processors back afterwards.

    Only self-attention (`attn1`) changes; text cross-attention (`attn2`) stays as it is.

    Args:
        unet: Any stock UNet with self-attention.
        tile: Rows and columns of views in the sample, for weights that were trained with `tile_positions`.

    Raises:
        InputError: If the UNet's projections are fused: a fused self-attention has no keys of other tokens than its own.

    Source: Zero123++ section 2.2 (scaled reference attention); arXiv 2310.15110.
    """
    own = unet.attn_processors
    if any(isinstance(processor, FusedAttnProcessor2_0) for processor in own.values()):
        raise InputError("unet: reference attention needs separate projections. Call unet.unfuse_qkv_projections().")
    passes = ReferenceAttention(unet, tile)
    unet.set_attn_processor(
        {
            name: ReferenceAttnProcessor(name, inner, passes) if name.endswith("attn1.processor") else inner
            for name, inner in own.items()
        }
    )
    try:
        yield passes
    finally:
        unet.set_attn_processor(own)
        passes.tokens.clear()
