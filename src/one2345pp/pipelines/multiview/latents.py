"""Scales between pictures, latents of the VAE and what the tile UNet learns."""

from __future__ import annotations

from torch import Tensor


# Targets of the diffusion are images times 0.5 / 0.8 and latents moved to the statistics of natural images (Zero123++ code).
IMAGE_SCALE = 0.5 / 0.8
LATENT_SCALE, LATENT_SHIFT = 0.75, 0.22


def scale_latents(latents: Tensor) -> Tensor:
    """Latents of the VAE (times its scaling factor) to what the UNet learns."""
    return (latents - LATENT_SHIFT) * LATENT_SCALE


def unscale_latents(latents: Tensor) -> Tensor:
    """Inverse of `scale_latents`."""
    return latents / LATENT_SCALE + LATENT_SHIFT
