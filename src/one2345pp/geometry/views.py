"""Pictures and the cameras that see them, as one value. Cutting objects out of their backgrounds lives in `pipelines.picture`."""

# V views

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from .cameras import CameraRig
from .pictures import SUFFIXES, find_picture, open_image
from .tile import COLUMNS, ROWS, split_tile


DEFAULT_RIG = "zero123plus-v1.2"


@dataclass(frozen=True, eq=False)
class Views(Sequence):
    """`V` pictures of one object and their cameras; a sequence of the pictures.

    Args:
        images: PIL pictures, `RGBA`, or `RGB` on a plain background.
        rig: Their cameras, in the same order, or a rig's name.

    Raises:
        InputError: If these are not pictures, or not as many as cameras.
    """

    images: tuple[Image.Image, ...]  # [V]
    rig: CameraRig  # [V]

    def __post_init__(self):
        images = tuple(self.images) if isinstance(self.images, Sequence) else ()
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise InputError("views: expected a list of PIL images. Views.load(folder) reads files.")
        rig = CameraRig.of(self.rig)
        if len(images) != len(rig):
            name = f"rig {rig.name!r}, which has {len(rig)} cameras" if rig.name else f"a rig of {len(rig)} cameras"
            raise InputError(
                f"views: got {len(images)} images for {name}. "
                f"Pass {len(rig)} images, or a CameraRig with {len(images)} cameras."
            )
        object.__setattr__(self, "images", tuple(_in_colour(image) for image in images))
        object.__setattr__(self, "rig", rig)

    # --- a sequence ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        """A picture, or with a slice some of the views."""
        return Views(self.images[index], self.rig[index]) if isinstance(index, slice) else self.images[index]

    def __add__(self, other: Views) -> Views:
        """These views, then others of the same object."""
        return Views((*self.images, *other.images), CameraRig.cat([self.rig, other.rig]))

    # --- what callers pass --------------------------------------------------------------------------------------

    @classmethod
    def of(cls, views: Views | Sequence[Image.Image], cameras: CameraRig | str | None = None) -> Views:
        """Views as they are, or pictures with their cameras, by default those of the rig `"zero123plus-v1.2"`."""
        if not isinstance(views, cls):
            return cls(views, DEFAULT_RIG if cameras is None else cameras)
        if cameras is not None:
            raise InputError("cameras: these views have their own. Leave cameras out, or pass a list of pictures.")
        return views

    @classmethod
    def batch(cls, views, cameras: CameraRig | str | Sequence[CameraRig | str] | None = None) -> list[Views]:
        """One object's views or a list of such, with one rig for all or a list with each one's, as one `Views` an object."""
        if isinstance(views, cls) or not isinstance(views, Sequence) or not len(views):
            several = [views]
        else:
            several = list(views) if isinstance(views[0], Sequence) else [views]
        rigs = list(cameras) if isinstance(cameras, list | tuple) else [cameras] * len(several)
        if len(rigs) != len(several):
            raise InputError(
                f"cameras: got {len(rigs)} rigs for {len(several)} samples. Pass one rig, or one a sample."
            )
        return [cls.of(one, rig) for one, rig in zip(several, rigs, strict=True)]

    # --- other pictures, the same cameras -----------------------------------------------------------------------

    def map(self, change: Callable[[Image.Image], Image.Image]) -> Views:
        """The views with every picture changed, as seen by the same cameras."""
        return Views(tuple(change(image) for image in self.images), self.rig)

    def squared(self) -> Views:
        """Views that are not square padded to squares, and their cameras widened: a field of view belongs to a picture's width.

        What has transparency is padded with it, what has none with the colours of its border.
        """
        if all(image.width == image.height for image in self.images):
            return self
        stretch = torch.tensor([max(image.size) / image.width for image in self.images])
        fov = 2 * torch.atan(self.rig.tan_half_fov * stretch)
        rig = replace(self.rig, fov=fov, half_width=self.rig.half_width * stretch, name=None)
        return Views(tuple(_square(image) for image in self.images), rig)

    # --- files --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, rig: CameraRig | str | None = None, max_side: int = 1024) -> Views:
        """Read pictures and their cameras.

        Args:
            path: A folder with `cameras.json`, or one tile image.
            rig: Cameras of a tile image, a rig or its name. A folder has its own.
            max_side: Larger views are shrunk to this many pixels.

        Returns:
            Square pictures of one size, with the transparency or background that they have.

        Raises:
            InputError: If a picture is missing or cannot be used; the message names it.
        """
        path = Path(path)
        if not path.is_dir():
            return cls._load_tile(path, rig)
        if rig is not None:
            raise InputError(
                f"{path}: is a folder, whose cameras are in its cameras.json. A rig is for tile images only."
            )
        rig, names = CameraRig.load(path)
        views = cls([_open_frame(path, name) for name in names], rig).squared()
        side = min(max_side, max(image.width for image in views))
        return views.map(lambda image: image.resize((side, side), Image.Resampling.LANCZOS))

    @classmethod
    def _load_tile(cls, path: Path, rig: CameraRig | str | None) -> Views:
        tile = open_image(path)
        if rig is None:
            raise InputError(f"{path}: a tile image needs the name of its rig: {' or '.join(CameraRig.names())}.")
        if tile.width * ROWS != tile.height * COLUMNS or tile.width % COLUMNS:
            raise InputError(
                f"{path}: is {tile.width}x{tile.height} pixels, expected a tile of {ROWS} rows by {COLUMNS} columns of square "
                "views, such as 640x960."
            )
        return cls(split_tile(tile), rig)

    def save(self, folder: str | Path) -> None:
        """Write `views/000.png ...` and `cameras.json` into a folder; `load` reads it."""
        folder = Path(folder)
        (folder / "views").mkdir(parents=True, exist_ok=True)
        names = [f"views/{index:03d}.png" for index in range(len(self))]
        for name, image in zip(names, self.images, strict=True):
            partial = folder / f"{name}.part"
            image.save(partial, format="PNG")
            partial.replace(folder / name)
        self.rig.save(folder / "cameras.json", names)


def _in_colour(image: Image.Image) -> Image.Image:
    """`RGB` or `RGBA`, whatever a picture's mode."""
    if image.mode in ("RGB", "RGBA"):
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _square(image: Image.Image) -> Image.Image:
    """A picture in the middle of a square."""
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    pixels = np.asarray(image)
    if image.mode == "RGBA" and pixels[..., 3].min() < 128:
        square = Image.new("RGBA", (side, side))
        square.paste(image, (left, top))
        return square
    border = (top, side - image.height - top), (left, side - image.width - left), (0, 0)
    return Image.fromarray(np.pad(pixels, border, mode="edge"))


def _open_frame(folder: Path, name: str) -> Image.Image:
    """The picture of a frame, with the transparency or background that it has."""
    file = find_picture(folder, name)
    if file is None:
        raise InputError(
            f"{folder / 'cameras.json'}: frame {name!r}: no such image in {folder} (tried {', '.join(SUFFIXES)})."
        )
    picture = open_image(file)
    if picture.mode == "RGBA" and np.asarray(picture)[..., 3].max() < 26:
        raise InputError(f"{file}: is fully transparent. Leave out views that do not show the object.")
    return picture
