"""Cutting views out by their normals, as Zero123++ v1.2's normal generator draws them. By colour: `preprocess`."""

# H W pixels

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from ...errors import InputError
from ...geometry.tile import BACKGROUND


def key_by_normals(
    view: Image.Image, normals: Image.Image, object_length: float = 0.6, background_length: float = 0.2
) -> Image.Image:
    """Cut a view, or a whole tile, out of its grey where its normals are short.

    Normals say where the object is whatever its colour, so an object of the background's own grey is kept.

    Args:
        view: What was drawn, on grey.
        normals: The normals `n` of the same pixels, in the form `(n + 1) / 2`; where there is no object, grey: `n = 0`.
        object_length, background_length: Longer normals are the object, shorter ones the background, with a margin of two
            pixels; in between, alpha rises with the length.

    Returns:
        `RGBA`, straight alpha, the colours of the edge free of the grey.

    Source: Zero123++ v1.2's normal generator, whose thresholds these are; it goes on with closed-form matting of the margin.
    """
    if view.size != normals.size:
        raise InputError(
            f"normals: are {normals.width}x{normals.height} pixels, the view {view.width}x{view.height}. Make them the same."
        )
    length = np.linalg.norm(np.asarray(normals.convert("RGB"), np.float32) / 127.5 - 1, axis=-1)  # [H, W]
    square = np.ones((4, 4), bool)
    inside = ndimage.binary_erosion(length > object_length, square, border_value=1)
    outside = ndimage.binary_erosion(length < background_length, square, border_value=1)
    rising = np.clip((length - background_length) / (object_length - background_length), 0, 1)
    alpha = np.where(inside, 1.0, np.where(outside, 0.0, rising))[..., None]
    rgb, cover = np.asarray(view.convert("RGB"), np.float32), np.maximum(alpha, 0.1)
    colors = np.clip((rgb - (1 - cover) * np.float32(BACKGROUND)) / cover, 0, 255)
    return Image.fromarray(np.round(np.concatenate([colors, 255 * alpha], -1)).astype(np.uint8))
