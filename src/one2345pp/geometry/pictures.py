"""Picture files: any kind, read as 8-bit sRGB, upright. Cutting objects out lives in `pipelines.picture`."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..errors import InputError


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def find_picture(folder: Path, name: str) -> Path | None:
    """The file of a frame, if it is there; NeRF data leaves the suffix out."""
    suffixes = ("", *SUFFIXES, *(suffix.upper() for suffix in SUFFIXES))
    return next((file for suffix in suffixes if (file := folder / f"{name}{suffix}").is_file()), None)


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
    picture = _to_srgb(picture)
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


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Colours by the picture's own profile, if it has one of another colour space."""
    embedded = picture.info.get("icc_profile")
    if not embedded or picture.mode not in ("RGB", "RGBA", "CMYK"):
        return picture
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return picture
        opaque = picture if picture.mode == "CMYK" else picture.convert("RGB")
        converted = ImageCms.profileToProfile(opaque, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a damaged profile says nothing
        return picture
    if picture.mode == "RGBA":
        converted.putalpha(picture.getchannel("A"))
    return converted
