"""Framing: the object's bounding box centred in a square picture. Reading and keying pictures lives in `pipelines.preprocess`."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import InputError


def frame_object(rgba: Image.Image, size: int = 512, fill: float = 0.85) -> Image.Image:
    """Centre the object in a transparent square, its longest side `fill` of the square's.

    Args:
        rgba: Picture whose alpha is the object's mask.
        size: Side of the result in pixels.
        fill: Share of the side that the object's longest side takes.

    Raises:
        InputError: If nothing in the picture is opaque.
    """
    alpha = np.asarray(rgba.convert("RGBA"))[..., 3] > 25
    left, top, right, bottom = object_box(alpha)
    side = max(bottom - top, right - left) / fill
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    # "RGBa" is premultiplied, so that colours of transparent pixels do not bleed into the edge
    picture = rgba.convert("RGBA").convert("RGBa")
    picture = scaled_crop(picture, (x, y, x + side, y + side), size)
    return picture.convert("RGBA")


def object_box(
    mask: np.ndarray,  # [H, W] bool
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is covered, in pixels; refuses a picture that shows nothing."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        raise InputError("image: is fully transparent. Pass a picture whose object is opaque.")
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def scaled_crop(picture: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    """The box (which may leave the picture) resized to a square, with filtering when it shrinks."""
    left, top = int(np.floor(box[0])), int(np.floor(box[1]))
    right, bottom = int(np.ceil(box[2])), int(np.ceil(box[3]))
    canvas = Image.new(picture.mode, (right - left, bottom - top))
    canvas.paste(picture, (-left, -top))
    inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return canvas.resize((size, size), Image.Resampling.BICUBIC, box=inner)
