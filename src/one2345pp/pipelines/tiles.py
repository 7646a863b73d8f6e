"""The tile of stage 1: its layout, its background, and the scales between pictures, latents and what the UNet learns."""

# B images, h w pixels of a view

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


ROWS, COLUMNS = 3, 2
BACKGROUND = (127, 127, 127)
# Targets of the diffusion are images times 0.5 / 0.8 and latents moved to the statistics of natural images (Zero123++ code).
IMAGE_SCALE = 0.5 / 0.8
LATENT_SCALE, LATENT_SHIFT = 0.75, 0.22


def scale_latents(latents: Tensor) -> Tensor:
    """Latents of the VAE (times its scaling factor) to what the UNet learns."""
    return (latents - LATENT_SHIFT) * LATENT_SCALE


def unscale_latents(latents: Tensor) -> Tensor:
    """Inverse of `scale_latents`."""
    return latents / LATENT_SCALE + LATENT_SHIFT


def composite_on_grey(image: Image.Image) -> Image.Image:
    """RGB picture with what is transparent replaced by grey 127; opaque pictures pass unchanged."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, BACKGROUND)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def remove_grey(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    """`RGBA` with straight alpha of a picture on the tile's grey and its mask (`L`); `composite_on_grey` undoes it."""
    cover = np.asarray(alpha, np.float32)[..., None] / 255
    colors = (np.asarray(picture, np.float32) - (1 - cover) * np.float32(BACKGROUND)) / np.maximum(cover, 0.1)
    colors = np.where(cover > 0, colors.clip(0, 255), 127).round().astype(np.uint8)
    return Image.merge("RGBA", (*Image.fromarray(colors).split(), alpha))


def split_views(tiles: list[Image.Image] | np.ndarray | Tensor):
    """Cut tiles into views: lists of six PIL images, `[B, 6, h, w, 3]` (array) or `[B, 6, 3, h, w]` (tensor)."""
    if isinstance(tiles, torch.Tensor):
        return tiles.unflatten(3, (COLUMNS, -1)).unflatten(2, (ROWS, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    if isinstance(tiles, np.ndarray):
        batch, height, width, channels = tiles.shape
        cells = tiles.reshape(batch, ROWS, height // ROWS, COLUMNS, width // COLUMNS, channels)
        return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, *cells.shape[2:3], *cells.shape[4:])
    return [
        [
            tile.crop((x, y, x + tile.width // COLUMNS, y + tile.height // ROWS))
            for y in range(0, tile.height, tile.height // ROWS)
            for x in range(0, tile.width, tile.width // COLUMNS)
        ]
        for tile in tiles
    ]
