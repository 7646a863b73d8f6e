"""Pictures in: reading any file, cutting the object out, tiles and folders of views. Framing lives in `geometry.framing`."""

# H W pixels

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.framing import frame_object
from .cutout import key, plain_background
from .tiles import COLUMNS, ROWS


__all__ = [
    "frame_object",
    "isolate_object",
    "key_background",
    "load_views",
    "make_tile",
    "open_image",
    "split_tile",
]

BACKGROUNDS = ("auto", "alpha", "key", "rembg")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


# --- reading --------------------------------------------------------------------------------------------------------


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """Read a picture of any kind as 8-bit sRGB, upright.

    Args:
        image: A file, or a picture that is already open.

    Returns:
        `RGBA` if the picture has transparency, else `RGB`. Of an animation, the first frame.

    Raises:
        InputError: If the file is missing, is not a picture, is damaged, or has more than about 178 million pixels.
    """
    if isinstance(image, Image.Image):
        return _to_rgb_or_rgba(ImageOps.exif_transpose(image), "image")
    if not isinstance(image, str | Path):
        raise InputError(
            f"image: got {type(image).__name__}, expected a PIL image or a file. PIL.Image.fromarray makes one."
        )
    path = Path(image)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a picture' if path.is_dir() else 'no such file'}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit; the limit itself raises
            with Image.open(path) as opened:
                opened.load()
                picture = ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise InputError(f"{path}: has more than {limit} million pixels. Scale it down first.") from None
    except Exception as error:  # Pillow's decoders raise whatever they raise
        raise InputError(f"{path}: cannot be read as a picture ({error}). Pass PNG, JPEG or WebP.") from error
    return _to_rgb_or_rgba(picture, str(path))


def _to_rgb_or_rgba(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode in ("RGB", "RGBA") and "transparency" not in picture.info:
        return picture
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        top = 1.0 if picture.mode == "F" else 255.0 if values.max(initial=0) <= 255 else 65535.0
        if values.min() < 0 or values.max() > top:
            raise InputError(f"{name}: has values outside 0..{top:g}. Save it as 8-bit PNG.")
        return Image.fromarray(np.round(values * (255 / top)).astype(np.uint8)).convert("RGB")
    transparent = picture.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in picture.info
    picture = picture.convert("RGBA" if transparent else "RGB")
    picture.info.pop("transparency", None)
    return picture


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
                return picture
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


def _rembg(picture: Image.Image, name: str) -> Image.Image:
    try:
        import rembg

        return rembg.remove(picture).convert("RGBA")
    except (Exception, SystemExit) as error:  # rembg exits the process when its runtime is missing
        raise InputError(
            f"{name}: the background remover failed ({error}). Pass a cut-out (RGBA PNG) instead."
        ) from error


def key_background(view: Image.Image, background: tuple[int, int, int] = (127, 127, 127)) -> Image.Image:
    """Cut out an object on a background of one known colour, such as the grey of a generated tile.

    Only background that reaches the border counts, and holes (see `cutout.key`), so parts of the object that happen to have the
    background's colour stay.

    Returns:
        `RGBA`; an `RGBA` view comes back as it is.
    """
    if view.mode == "RGBA":
        return view
    rgb = np.asarray(view.convert("RGB"), np.float32)
    return key(rgb, np.broadcast_to(np.float32(background), rgb.shape), noise=8.0)


# --- tiles and folders of views -------------------------------------------------------------------------------------


def split_tile(tile: Image.Image) -> list[Image.Image]:
    """Cut a tile, 3 rows by 2 columns of square views, into its six views, row-major."""
    side = tile.width // COLUMNS
    if tile.size != (side * COLUMNS, side * ROWS) or side == 0:
        raise InputError(
            f"tile: is {_size(tile)} pixels, expected 3 rows by 2 columns of square views, such as 640x960."
        )
    corners = [(column * side, row * side) for row in range(ROWS) for column in range(COLUMNS)]
    return [tile.crop((x, y, x + side, y + side)) for x, y in corners]


def make_tile(views: list[Image.Image]) -> Image.Image:
    """Six square views of one size as a tile; `split_tile` undoes it."""
    count, side = ROWS * COLUMNS, views[0].width if views else 0
    if len(views) != count or any(view.size != (side, side) for view in views):
        sizes = ", ".join(_size(view) for view in views)
        raise InputError(f"views: got {len(views)} ({sizes}), expected {count} square views of one size.")
    tile = Image.new(views[0].mode, (side * COLUMNS, side * ROWS))
    for index, view in enumerate(views):
        row, column = divmod(index, COLUMNS)
        tile.paste(view, (column * side, row * side))
    return tile


def load_views(
    path: str | Path, rig: CameraRig | str | None = None, max_side: int = 1024
) -> tuple[list[Image.Image], CameraRig]:
    """Read views and their cameras.

    Args:
        path: A folder with `cameras.json`, or one tile image.
        rig: Cameras of a tile image, a rig or its name. A folder has its own.
        max_side: Larger views are shrunk to this many pixels.

    Returns:
        `V` square `RGBA` pictures of one size, and `V` cameras. Views that were not square are padded, and the field of view
        is that of the padded picture.

    Raises:
        InputError: If a frame is missing or cannot be used; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        if rig is not None:
            raise InputError(
                f"{path}: is a folder, whose cameras are in its cameras.json. A rig is for tile images only."
            )
        return _load_folder(path, max_side)
    tile = open_image(path)
    if rig is None:
        raise InputError(f"{path}: a tile image needs the name of its rig: {' or '.join(CameraRig.names())}.")
    rig = CameraRig.of(rig)
    views = [key_background(view) for view in split_tile(tile)]
    if len(views) != len(rig):
        raise InputError(f"{path}: a tile has {len(views)} views, the rig {len(rig)} cameras.")
    return views, rig


def _load_folder(folder: Path, max_side: int) -> tuple[list[Image.Image], CameraRig]:
    rig, names = CameraRig.load(folder)
    views = [_open_view(_frame_file(folder, name)) for name in names]
    side = min(max_side, max(max(view.size) for view in views))
    # camera_angle_x belongs to the width; the square is as wide as the longer side
    stretch = torch.tensor([max(view.size) / view.width for view in views])
    fov = 2 * torch.atan(rig.tan_half_fov * stretch)
    return [_padded(view).resize((side, side), Image.Resampling.LANCZOS) for view in views], replace(rig, fov=fov)


def _open_view(path: Path) -> Image.Image:
    """A view as `RGBA`. Its own alpha counts, even where the object fills it, unless it is unused on a plain background."""
    picture = open_image(path)
    if picture.mode == "RGBA":
        pixels = np.asarray(picture)
        if pixels[..., 3].max() < 26:
            raise InputError(f"{path}: is fully transparent. Leave out views that do not show the object.")
        if pixels[..., 3].min() < 128 or plain_background(pixels[..., :3].astype(np.float32)) is None:
            return picture
    return isolate_object(path)


def _frame_file(folder: Path, name: str) -> Path:
    """The image of a frame; NeRF data leaves the suffix out."""
    for suffix in ("", *IMAGE_SUFFIXES):
        candidate = folder / f"{name}{suffix}"
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{folder / 'cameras.json'}: frame {name!r}: no such image in {folder} (tried {', '.join(IMAGE_SUFFIXES)})."
    )


def _padded(view: Image.Image) -> Image.Image:
    side = max(view.size)
    square = Image.new("RGBA", (side, side))
    square.paste(view, ((side - view.width) // 2, (side - view.height) // 2))
    return square


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
