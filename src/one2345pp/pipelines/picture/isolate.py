"""The object of a picture, cut out: by its own transparency, its plain background, or a network. Colours: `cutout`."""

# H W pixels

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import InputError
from ...geometry.framing import object_box
from ...geometry.pictures import open_image
from ...geometry.tile import BACKGROUND
from ...geometry.views import Views
from ...names import BACKGROUNDS
from .cutout import key, plain_background


NOISE = 8.0  # levels that a drawn grey is off
RECTANGLE = 0.98  # share of its box that opaque pixels cover where they are a picture, and no object


# --- cutting the object out -----------------------------------------------------------------------------------------


def isolate_object(
    image: str | Path | Image.Image,
    mask: str | Path | Image.Image | None = None,
    background: str = "auto",
    max_side: int = 2048,
) -> Image.Image:
    """Cut the object out of its background.

    Args:
        image: File or picture.
        mask: White where the object is, as large as the image. Decides alone when given.
        background: How to find the object without a mask: `"alpha"` (the picture's own transparency), `"key"` (a plain
            background, by the colour of the picture's border), `"rembg"` (a segmentation network, the `[background]`
            extra), or `"auto"`: the first of these that can be used.
        max_side: Larger pictures are shrunk to this many pixels.

    Returns:
        `RGBA` picture, straight alpha, colours of the edge free of the background's.

    Raises:
        InputError: If there is no object to find, or no way to find it.
    """
    if background not in BACKGROUNDS:
        raise InputError(f"background: got {background!r}, expected one of {', '.join(BACKGROUNDS)}.")
    name = str(image) if isinstance(image, (str, Path)) else "image"
    picture = open_image(image)
    if mask is not None:
        alpha = open_image(mask).convert("L")
        if alpha.size != picture.size:
            raise InputError(f"mask: is {_size(alpha)} pixels, the image {_size(picture)}. Make them the same.")
        picture = picture.convert("RGB")
        picture.putalpha(alpha)
    if max(picture.size) > max_side:
        picture = picture.copy()
        picture.thumbnail((max_side, max_side))
    if mask is None:
        picture = _remove_background(picture, background, name)
    solid = int((np.asarray(picture)[..., 3] >= 128).sum())
    if solid < 64:
        raise InputError(
            f"{name}: shows no object ({solid} opaque pixels). Pass a picture of one object that fills it."
        )
    return picture


def _remove_background(picture: Image.Image, background: str, name: str) -> Image.Image:
    if background in ("auto", "alpha"):
        if picture.mode == "RGBA":
            alpha = np.asarray(picture)[..., 3]
            if alpha.max() < 26:
                raise InputError(f"{name}: is fully transparent. Pass a picture whose object is opaque.")
            if alpha.min() < 128:
                return within_backdrop(picture)
        if background == "alpha":
            raise InputError(f"{name}: has no transparent background. Pass a cut-out (RGBA), or background='auto'.")
    picture = picture.convert("RGB")
    if np.ptp(np.asarray(picture).reshape(-1, 3), axis=0).max() < 8:
        raise InputError(f"{name}: is one flat colour, so it shows no object.")
    if background in ("auto", "key"):
        plain = plain_background(np.asarray(picture, np.float32))
        if plain is not None:
            return key(np.asarray(picture, np.float32), *plain, shadows=True)
        if background == "key":
            raise InputError(f"{name}: its background is not plain. Pass a cut-out (RGBA), or background='rembg'.")
    if importlib.util.find_spec("rembg") is None:
        raise InputError(
            f"{name}: has neither transparency nor a plain background. Pass a cut-out (RGBA PNG), "
            "or install the background remover: pip install 'one2345pp[background]'."
        )
    return _rembg(picture, name)


def within_backdrop(picture: Image.Image) -> Image.Image:
    """A picture with transparency: as it is, unless what is opaque is a rectangle with a plain border from side to side, such as a
    screenshot with round corners or a photograph padded to a square. Then the object within is cut out of that backdrop, too. A
    rectangle that stands free is an object, such as a book."""
    pixels = np.asarray(picture)
    solid = pixels[..., 3] >= 128
    if not solid.any():
        return picture
    left, top, right, bottom = object_box(solid)
    box = pixels[top:bottom, left:right]
    inside = solid[top:bottom, left:right]
    spans = max((right - left) / picture.width, (bottom - top) / picture.height)
    if min(inside.mean(), spans) < RECTANGLE:
        return picture
    rgb = box[..., :3].astype(np.float32)
    rgb[~inside] = np.median(_border(rgb)[_border(inside[..., None])[:, 0]], 0)
    plain = plain_background(rgb)
    if plain is None:
        return picture
    cut = np.asarray(key(rgb, *plain, shadows=True))
    if (cut[..., 3] >= 128).sum() < max(64, 0.01 * cut.shape[0] * cut.shape[1]):  # the rectangle is the object
        return picture
    out = np.zeros_like(pixels)
    out[top:bottom, left:right, :3] = cut[..., :3]
    out[top:bottom, left:right, 3] = np.minimum(cut[..., 3], box[..., 3])
    return Image.fromarray(out)


def _border(
    values: np.ndarray,  # [H, W, C]
) -> np.ndarray:
    """The outermost pixels, `[P, C]`."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _rembg(picture: Image.Image, name: str) -> Image.Image:
    try:
        import rembg

        return rembg.remove(picture).convert("RGBA")
    except (Exception, SystemExit) as error:  # rembg exits the process when its runtime is missing
        raise InputError(
            f"{name}: the background remover failed ({error}). Pass a cut-out (RGBA PNG) instead."
        ) from error


# --- views ------------------------------------------------------------------------------------------------------------


def cut_out_views(views: Views) -> Views:
    """Square views whose pictures are all `RGBA`: as they are, or cut out of their plain background, see `cut_out_view`.

    This is the door of every pipeline that takes views.

    Raises:
        InputError: If a picture has neither transparency nor a plain background; the message says which.
    """
    numbers = itertools.count(1)

    def cut_out(view: Image.Image) -> Image.Image:
        number = next(numbers)
        try:
            return cut_out_view(view)
        except InputError as error:
            raise InputError(f"views: number {number}: {error}") from None

    return views.squared().map(cut_out)


def cut_out_view(view: Image.Image) -> Image.Image:
    """One view as `RGBA`. Its own alpha counts, even where the object fills it, unless it is unused on a plain background."""
    if view.mode == "RGBA":
        pixels = np.asarray(view)
        if pixels[..., 3].min() < 128:
            return within_backdrop(view)
        if plain_background(pixels[..., :3].astype(np.float32)) is None:
            return view
        view = view.convert("RGB")
    return key_background(view) if _is_on_grey(view) else isolate_object(view)


def key_background(view: Image.Image, background: tuple[int, int, int] = BACKGROUND) -> Image.Image:
    """Cut out an object on a background of one known colour, such as the grey of a generated tile.

    Only background that reaches the border counts, and holes (see `cutout.key`), so parts of the object that happen to have the
    background's colour stay.

    Returns:
        `RGBA`; an `RGBA` view comes back as it is.
    """
    if view.mode == "RGBA":
        return view
    rgb = np.asarray(view.convert("RGB"), np.float32)
    return key(rgb, np.broadcast_to(np.float32(background), rgb.shape), noise=NOISE)


def _is_on_grey(view: Image.Image, tolerance: float = 3.0) -> bool:
    """Whether the border of a picture is the grey of a generated tile, but for noise."""
    rgb = np.asarray(view.convert("RGB"), np.float32)
    return bool(np.abs(np.median(_border(rgb), 0) - np.float32(BACKGROUND)).max() <= tolerance)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
