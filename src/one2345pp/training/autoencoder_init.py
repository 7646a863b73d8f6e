"""A first state of an `AutoencoderKL` in which it already carries colours. Training it lives in `encoders`.

A small autoencoder that starts from random weights spends most of its time on finding out that a latent should hold the mean colour of
its cell: its norms take the level of a picture away. Here the weights start such that three latents are the average colour of a cell
and decoding interpolates them; everything else starts at random and learns the rest.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..errors import InputError


LEVEL = 1.5  # of the constant channels that dominate a group's variance, so that a norm is nearly linear in the colours
GAIN = 0.2  # of a colour about the point where SiLU is nearly linear
SHIFT = 3.0  # that point
LATENT_GAIN = 4.0  # colours in a latent against its first noise
FIRST_LOG_VARIANCE = -6.0


def initialize_with_colors(vae: AutoencoderKL) -> None:
    """Set the weights in place. In each of three norm groups four channels are colour, minus colour, plus and minus a constant.

    Raises:
        InputError: If the norms have fewer than three groups, or groups of fewer than four channels.
    """
    groups, widths = vae.config.norm_num_groups, vae.config.block_out_channels
    if groups < 3 or min(widths) // groups < 4:
        raise InputError(
            f"vae: {groups} norm groups over widths {list(widths)}; expected at least 3 groups of 4 channels."
        )
    silu_slope = torch.sigmoid(torch.tensor(SHIFT)).item() * (
        1 + SHIFT * (1 - torch.sigmoid(torch.tensor(SHIFT)).item())
    )
    read = 1 / (2 * GAIN * silu_slope)

    def slots(width: int) -> Tensor:
        """Channels of colour, minus colour, constant, minus constant for each of R, G, B: `[3, 4]`."""
        return torch.arange(3)[:, None] * (width // groups) + torch.arange(4)

    def pass_on(conv: nn.Conv2d, colors: Tensor, constants: Tensor) -> None:
        """Carry the reserved channels through a convolution, with a kernel `[k, k]` for either kind."""
        into, out = slots(conv.in_channels), slots(conv.out_channels)
        conv.weight[out.flatten()] = 0
        conv.bias[out.flatten()] = 0
        for kind, kernel in enumerate((colors, colors, constants, constants)):
            conv.weight[out[:, kind], into[:, kind]] = kernel

    def write(conv: nn.Conv2d) -> None:
        """Put the first three input channels, and the constants, in their places."""
        out = slots(conv.out_channels)
        conv.weight[out.flatten()] = 0
        conv.bias[out.flatten()] = torch.tensor([0, 0, LEVEL, -LEVEL]).repeat(3)
        for kind, sign in ((0, 1.0), (1, -1.0)):
            conv.weight[out[:, kind], torch.arange(3), 1, 1] = sign

    def read_out(norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
        """Undo norm and SiLU: the difference of colour and minus colour, about where SiLU is linear."""
        into = slots(conv.in_channels)
        deviation = LEVEL * math.sqrt(2 / (norm.num_channels // groups))
        norm.weight[into[:, :2]] = GAIN * deviation
        norm.bias[into[:, :2]] = SHIFT
        conv.weight[:3, into.flatten()] = 0
        conv.weight[:3] *= 0.05  # what starts at random stays in the background
        conv.bias[:3] = 0
        for kind, sign in ((0, 1.0), (1, -1.0)):
            conv.weight[torch.arange(3), into[:, kind], 1, 1] = sign * read

    one, tap, mean = torch.ones(1, 1), torch.zeros(3, 3), torch.zeros(3, 3)
    tap[1, 1], mean[:2, :2] = 1, 0.25  # the downsampler's window starts at its pixel: its first two taps are the cell
    smooth = torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2)
    encoder, decoder, latents = vae.encoder, vae.decoder, vae.config.latent_channels
    with torch.no_grad():
        for block in (module for module in vae.modules() if isinstance(module, ResnetBlock2D)):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
            if block.conv_shortcut is not None:
                pass_on(block.conv_shortcut, one, one)
        write(encoder.conv_in)
        for block in encoder.down_blocks:
            for sampler in block.downsamplers or []:
                pass_on(sampler.conv, mean, mean)
        read_out(encoder.conv_norm_out, encoder.conv_out)
        for conv, gain in ((vae.quant_conv, LATENT_GAIN), (vae.post_quant_conv, 1 / LATENT_GAIN)):
            conv.weight[:3] = 0
            conv.bias[:3] = 0
            conv.weight[torch.arange(3), torch.arange(3), 0, 0] = gain
        vae.quant_conv.weight[latents:] = 0
        vae.quant_conv.bias[latents:] = FIRST_LOG_VARIANCE
        write(decoder.conv_in)
        for block in decoder.up_blocks:
            for sampler in block.upsamplers or []:
                pass_on(sampler.conv, smooth, tap)
        read_out(decoder.conv_norm_out, decoder.conv_out)
