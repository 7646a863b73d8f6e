"""Reference attention: a stock UNet2DConditionModel that also attends to the tokens of a reference image.

Two passes over one UNet, no parameters of its own. Noising, guidance and the sampling loop live in the pipeline.
"""

# B samples, N tokens of the sample, M tokens of the reference, C channels

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import Tensor

from ..errors import InputError


class ReferenceAttention:
    """The write and read passes of one UNet, usable inside `reference_attention`.

    Gradients flow through both passes. Gradient checkpointing does not fit: it repeats the write pass after the mode has changed.
    """

    def __init__(self, unet: UNet2DConditionModel, layers: int):
        self._unet = unet
        self._layers = layers  # number of self-attentions
        self.mode = "read"
        self.tokens: dict[str, Tensor] = {}  # what each self-attention saw of the reference, [B, M, C]

    def write(self, reference: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs) -> None:
        """Run the UNet on the noised reference latents `[B, c, h, w]` and keep the input tokens of every self-attention.

        Nobody reads the UNet's output, so the pass ends where the last self-attention has its tokens; compiled, it runs through.
        """
        self.tokens.clear()
        self.mode = "write"
        try:
            self._unet(reference, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False, **kwargs)
        except _AllKept:
            pass

    def keep(self, name: str, tokens: Tensor) -> None:
        """Store what the self-attention `name` saw of the reference, and end the pass if that was the last one."""
        self.tokens[name] = tokens
        if not torch.compiler.is_compiling() and len(self.tokens) == self._layers:
            raise _AllKept

    def read(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs) -> Tensor:
        """Run the UNet on `sample [B, c, H, W]`; keys and values come from its own tokens and the kept ones.

        Returns:
            The UNet's prediction, `[B, c, H, W]`.
        """
        self.mode = "read"
        return self._unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False, **kwargs)[0]


class _AllKept(Exception):
    """Every self-attention has its tokens."""


class ReferenceAttnProcessor:
    """A self-attention processor that stores its tokens (write), or lets another one attend to the stored ones too (read)."""

    def __init__(self, name: str, inner, passes: ReferenceAttention):
        self.name, self.inner, self.passes = name, inner, passes

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None) -> Tensor:
        context = hidden_states  # [B, N, C]
        if self.passes.mode == "write":
            self.passes.keep(self.name, hidden_states)
        else:
            context = torch.cat([hidden_states, self.passes.tokens[self.name]], dim=1)  # [B, N + M, C]
        return self.inner(attn, hidden_states, context, attention_mask)


@contextmanager
def reference_attention(unet: UNet2DConditionModel) -> Iterator[ReferenceAttention]:
    """Install reference attention in `unet` for the block, and put its own attention processors back afterwards.

    Only self-attention (`attn1`) changes; text cross-attention (`attn2`) stays as it is.

    Raises:
        InputError: If the UNet's projections are fused: a fused self-attention has no keys of other tokens than its own.

    Source: Zero123++ section 2.2 (scaled reference attention); arXiv 2310.15110.
    """
    own = unet.attn_processors
    if any(isinstance(processor, FusedAttnProcessor2_0) for processor in own.values()):
        raise InputError("unet: reference attention needs separate projections. Call unet.unfuse_qkv_projections().")
    passes = ReferenceAttention(unet, layers=sum(name.endswith("attn1.processor") for name in own))
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
