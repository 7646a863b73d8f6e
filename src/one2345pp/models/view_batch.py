"""Views and their cameras as condition encoders take them: the one encoding of pictures, for training and inference.

Axes: B samples, V views, C channels, S side of a view, P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..geometry.cameras import CameraRig, project_points


RGBA = 4  # channels of a view without maps


@dataclass
class ViewBatch:
    """Views of a batch of samples with their cameras.

    Args:
        images: `[B, V, C, S, S]` in [-1, 1], see `encode_pictures`.
        world_to_camera: `[B, V, 4, 4]`
        tan_half_fov: `[B, V]`, 0 for orthographic cameras.
        half_width: `[B, V]` in world units, 0 for pinhole cameras.
        present: `[B, V]` bool, false for padding.
        patches: Feature maps of a pre-trained encoder (DINOv2), `[B, V, C, h, w]`, or `None`.
    """

    images: Tensor
    world_to_camera: Tensor
    tan_half_fov: Tensor
    half_width: Tensor
    present: Tensor
    patches: Tensor | None = None

    @classmethod
    def from_pictures(
        cls,
        pictures: Sequence[Sequence[Image.Image]],
        rigs: Sequence[CameraRig],
        size: int,
        maps: Sequence[Mapping[str, Sequence[Image.Image]]] | None = None,
    ) -> ViewBatch:
        """Views of some samples. One with fewer views than another repeats its first, marked as absent.

        Args:
            pictures: `RGBA` pictures of each sample's views.
            rigs: A camera a view, for each sample.
            size: Side of the encoder's images in pixels.
            maps: See `encode_pictures`, for each sample.
        """
        most = max(len(rig) for rig in rigs)
        orders = [[*range(len(rig)), *[0] * (most - len(rig))] for rig in rigs]

        def padded(parts: list[Tensor]) -> Tensor:
            return torch.stack([part[order] for part, order in zip(parts, orders, strict=True)])

        images = zip(pictures, [None] * len(rigs) if maps is None else maps, strict=True)
        return cls(
            padded([encode_pictures(own, size, extra) for own, extra in images]),
            padded([rig.world_to_camera for rig in rigs]),
            padded([rig.tan_half_fov for rig in rigs]),
            padded([rig.half_width for rig in rigs]),
            torch.stack([torch.arange(most) < len(rig) for rig in rigs]),
        )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device) -> ViewBatch:
        return ViewBatch(*(None if value is None else value.to(device) for value in vars(self).values()))

    def sample(
        self,
        features: Tensor,  # [V, C, h, w]
        points: Tensor,  # [P, 3]
        index: int,
    ) -> Tensor:
        """Read feature maps of sample `index` where its cameras see points, `[V, P, C]`; 0 outside."""
        uv, depth = project_points(
            points, self.world_to_camera[index], self.tan_half_fov[index], self.half_width[index]
        )
        uv = torch.where(depth[..., None] > 0, uv, 2.0)  # behind a camera is outside its image
        precise = torch.promote_types(features.dtype, torch.float32)  # half precision puts places half a pixel off
        values = F.grid_sample(features.to(precise), uv[:, None].to(precise), align_corners=False)
        return values[:, :, 0].mT.to(features.dtype)

    def directions(
        self,
        points: Tensor,  # [P, 3]
        index: int,
    ) -> Tensor:
        """Unit vectors from points to the eyes of sample `index`, in the world, `[V, P, 3]`: to a pinhole camera's centre, along the
        axis of an orthographic one."""
        rotation, translation = self.world_to_camera[index, :, :3, :3], self.world_to_camera[index, :, :3, 3]
        position = -torch.einsum("vij,vi->vj", rotation, translation)
        to_center = F.normalize(position[:, None] - points, dim=-1)
        return torch.where(self.half_width[index, :, None, None] > 0, rotation[:, 2, None], to_center)


def encode_pictures(
    pictures: Sequence[Image.Image], size: int, maps: Mapping[str, Sequence[Image.Image]] | None = None
) -> Tensor:
    """Pictures of views as condition encoders see them.

    Args:
        pictures: `V` `RGBA` pictures, straight alpha.
        size: Side of the result in pixels.
        maps: Extra maps of the views by name, a picture a view of any size: one with one band has one channel, others have three.

    Returns:
        `[V, C, size, size]` in [-1, 1]: colour on mid grey (0), alpha, the maps in the order of their names, 0 outside the object.
    """
    names = sorted(maps or {})  # a saved config forgets any other order
    rows = zip(pictures, *(maps[name] for name in names), strict=True)
    return torch.stack([_encode(picture, size, extra) for picture, *extra in rows])


def _encode(picture: Image.Image, size: int, maps: Sequence[Image.Image]) -> Tensor:
    """One view, `[C, size, size]`."""
    rgba, alpha = _premultiplied(picture, size), picture.getchannel("A")
    channels = [rgba[:3] * 2 - rgba[3:], rgba[3:] * 2 - 1]
    for values in maps:
        values = values.convert("L" if len(values.getbands()) == 1 else "RGB")
        values = values.resize(picture.size, Image.Resampling.BILINEAR)
        values.putalpha(alpha)
        cut = _premultiplied(values, size)
        channels.append(cut[:-1] * 2 - cut[-1:])
    return torch.cat(channels)


def _premultiplied(picture: Image.Image, size: int) -> Tensor:
    """A picture with straight alpha, `[C, size, size]` in [0, 1], its values times alpha, alpha last."""
    picture = picture.convert({"RGBA": "RGBa", "LA": "La"}[picture.mode])
    if picture.size != (size, size):
        resample = Image.Resampling.BOX if size < picture.width else Image.Resampling.BICUBIC
        picture = picture.resize((size, size), resample)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255
