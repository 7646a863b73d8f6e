"""What a call of the stage 2 pipeline may be given, and views as its condition encoders take them.

Axes: B samples, V views, C channels, S pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..models.condition_encoder import GIVEN, PICTURE, VIEW_KINDS, ViewBatch
from .preprocess import isolate_object


RGBA = 4  # channels of a view without normals


def check_views(views, cameras) -> tuple[list[list[Image.Image]], list[CameraRig]]:
    """Views and their rigs, one entry a sample; as many views as a rig has cameras."""
    if not isinstance(views, (list, tuple)) or len(views) == 0:
        raise InputError("views: expected a list of PIL images, or a list of such lists.")
    batch = [list(v) for v in views] if isinstance(views[0], (list, tuple)) else [list(views)]
    rigs = [CameraRig.of(c) for c in (cameras if isinstance(cameras, (list, tuple)) else [cameras] * len(batch))]
    if len(rigs) != len(batch):
        raise InputError(f"cameras: got {len(rigs)} rigs for {len(batch)} samples. Pass one rig, or one a sample.")
    for pictures, rig in zip(batch, rigs, strict=True):
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            raise InputError("views: expected PIL images. Read files with one2345pp.pipelines.preprocess.load_views.")
        if len(pictures) != len(rig):
            name = f"rig {rig.name!r}, which has {len(rig)} cameras" if rig.name else f"a rig of {len(rig)} cameras"
            raise InputError(
                f"views: got {len(pictures)} images for {name}. "
                f"Pass {len(rig)} images, or a CameraRig with {len(pictures)} cameras."
            )
    return batch, rigs


def check_normals(normals, batch: list[list[Image.Image]], needed: bool) -> list[list[Image.Image]] | None:
    """A picture of normals for every view, where the encoders take them, and only there."""
    if not needed:
        if normals is not None:
            raise InputError("normals: these condition encoders take none (view_channels is 4). Leave them out.")
        return None
    if normals is None:
        raise InputError(
            "normals: these condition encoders need a picture of normals for every view (view_channels is 7)."
        )
    lists = [list(n) for n in normals] if isinstance(normals[0], (list, tuple)) else [list(normals)]
    if [len(n) for n in lists] != [len(v) for v in batch]:
        raise InputError(f"normals: got {[len(n) for n in lists]}, expected one a view: {[len(v) for v in batch]}.")
    return lists


def check_kinds(kinds, batch: list[list[Image.Image]]) -> list[list[str]] | None:
    """What kind each view is, one list a sample, of names in `VIEW_KINDS`; at most one picture a sample."""
    if kinds is None:
        return None
    lists = [list(kinds)] if len(kinds) and isinstance(kinds[0], str) else [list(names) for names in kinds]
    if [len(names) for names in lists] != [len(pictures) for pictures in batch]:
        raise InputError(f"kinds: got {kinds!r}, expected one a view: {[len(pictures) for pictures in batch]}.")
    for names in lists:
        if not set(names) <= set(VIEW_KINDS) or names.count(PICTURE) > 1 or names.count(PICTURE) == len(names):
            raise InputError(
                f"kinds: got {names}, expected {', '.join(VIEW_KINDS)}, and of {PICTURE!r} at most one beside other views."
            )
    return lists


def encoder_views(
    views: list[list[Image.Image]],
    rigs: list[CameraRig],
    size: int,
    normals: list[list[Image.Image]] | None = None,
    kinds: list[list[str]] | None = None,
) -> ViewBatch:
    """Views of every sample, resized. Samples with fewer views than another repeat one, marked as absent."""
    most = max(len(v) for v in views)
    batch = []
    for sample, (pictures, rig) in enumerate(zip(views, rigs, strict=True)):
        drawn = [None] * len(pictures) if normals is None else normals[sample]
        images = torch.stack([_encoder_image(p, size, n) for p, n in zip(pictures, drawn, strict=True)])[None]
        one = ViewBatch.make(images, [rig])
        index = list(range(len(rig))) + [0] * (most - len(rig))
        names = [GIVEN] * len(pictures) if kinds is None else kinds[sample]
        one.kinds = torch.tensor([[VIEW_KINDS.index(names[i]) for i in index]])
        one.present = (torch.arange(most) < len(rig))[None]
        one.images, one.world_to_camera = one.images[:, index], one.world_to_camera[:, index]
        one.tan_half_fov = one.tan_half_fov[:, index]
        batch.append(one)
    fields = ("images", "world_to_camera", "tan_half_fov", "present", "kinds")
    return ViewBatch(**{name: torch.cat([getattr(one, name) for one in batch]) for name in fields})


def _encoder_image(picture: Image.Image, size: int, normals: Image.Image | None) -> Tensor:
    """RGBA to `[C, size, size]` in [-1, 1]: colour on mid grey (0), alpha, and normals, 0 outside the object."""
    rgba = picture if picture.mode == "RGBA" else isolate_object(picture)
    values = _premultiplied(rgba, size)
    channels = [values[:3] * 2 - values[3:], values[3:] * 2 - 1]
    if normals is not None:
        cut = normals.convert("RGB").resize(rgba.size, Image.Resampling.BILINEAR)
        cut.putalpha(rgba.getchannel("A"))
        cut = _premultiplied(cut, size)
        channels.append(cut[:3] * 2 - cut[3:])
    return torch.cat(channels)


def _premultiplied(rgba: Image.Image, size: int) -> Tensor:
    """`[4, size, size]` in [0, 1], the colours times alpha."""
    picture = rgba.convert("RGBa")
    if picture.size != (size, size):
        resample = Image.Resampling.BOX if size < rgba.width else Image.Resampling.BICUBIC
        picture = picture.resize((size, size), resample)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255
