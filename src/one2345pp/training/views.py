"""What the volume networks are conditioned on while they learn: true views made as imperfect as drawn ones. Losses live elsewhere."""

# B samples, V views, C channels, S pixels of a side

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.maps import MAPS
from ..data.prepare import RIGS
from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..models.view_batch import ViewBatch, encode_pictures
from ..pipelines.picture.isolate import key_background


DRAWN_RIG = "zero123plus-v1.2"  # of first stages


@dataclass(frozen=True)
class ViewSettings:
    """How imperfect views are; all but the last three are probabilities."""

    drawn: float = 0.5  # of the views that a first stage drew, of samples that have some
    mirror: float = 0.5
    recolor: float = 0.2  # of permuting the colour channels
    rekey: float = 0.4  # that the masks come from keying a grey background, as for a generated tile
    blur: float = 0.3  # of views of a lower resolution
    drop_view: float = 0.1  # how many of six views are missing on average: each with a sixth of this probability
    perturb: float = 0.5  # of perturbed projections (One-2-3-45++ section 3.2)
    perturb_rotation: float = 0.7  # degrees, standard deviation
    perturb_translation: float = 0.008  # world units
    perturb_focal: float = 0.01  # share

    def still(self, drawn: bool = False) -> ViewSettings:
        """Views as they are: the true ones, or those that were drawn."""
        chances = ("mirror", "recolor", "rekey", "blur", "drop_view", "perturb")
        return replace(self, drawn=float(drawn), **dict.fromkeys(chances, 0.0))


class SampleBatch:
    """Items of a `PreparedDataset` as tensors in one random world: mirrored or not, recoloured or not.

    Args:
        items: `B` of them.
        settings: How imperfect their views are.
        size: Side of the encoder's images in pixels.
        maps: Names of the maps that the encoder takes.
        generator: Source of every draw.

    Attributes:
        views: `ViewBatch` of `B` samples.
        sdf: `[B, X, Y, Z]`, in units of the truncation distance, -1 to 1.
        colors: `[B, 3, X, Y, Z]` in [-1, 1], 0 outside the band.
        inputs: One input picture a sample, `RGBA`.
    """

    def __init__(
        self, items: list[dict], settings: ViewSettings, size: int, maps: Collection[str], generator: torch.Generator
    ):
        samples = [_sample(item, settings, size, maps, generator) for item in items]
        views, sdf, colors, inputs = zip(*samples, strict=True)
        self.views = ViewBatch(*map(torch.stack, zip(*views, strict=True)))
        self.sdf, self.colors, self.inputs = torch.stack(sdf), torch.stack(colors), list(inputs)


def _sample(item: dict, settings: ViewSettings, size: int, maps: Collection[str], generator: torch.Generator) -> tuple:
    """One sample: the fields of its `ViewBatch`, `sdf`, `colors` and input picture."""

    def chance(probability: float) -> bool:
        return torch.rand((), generator=generator).item() < probability

    rig, views, extra, picture, drawn = _pick_views(item, chance(settings.drawn), maps, generator)
    sdf = item["sdf"].float() / 127
    color = torch.zeros(3, *sdf.shape)
    x, y, z = item["coords"].T
    color[:, x, y, z] = item["colors"].T.float() / 127.5 - 1
    matrix, tangent, half_width = rig.world_to_camera, rig.tan_half_fov, rig.half_width
    if chance(settings.mirror):
        views, picture, sdf, color = views.flip(-1), picture.flip(-1), sdf.flip(0), color.flip(1)
        extra = {name: MAPS[name].mirror(values.flip(-1)) for name, values in extra.items()}
        flip = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
        matrix = flip @ matrix @ flip
    if chance(settings.recolor):
        order = torch.cat([torch.randperm(3, generator=generator), torch.tensor([3])])
        views, picture, color = views[:, order], picture[order], color[order[:3]]
    if chance(settings.rekey) and not drawn:  # drawn ones are
        views = _rekey(views)
    if chance(settings.blur):
        small = int(torch.randint(32, 72, (), generator=generator))
        views = F.interpolate(views, size=small, mode="area")
        extra = {name: F.interpolate(values, size=small, mode="area") for name, values in extra.items()}
    if chance(settings.perturb):
        matrix, tangent, half_width = perturb_cameras(matrix, tangent, half_width, settings, generator)
    present = torch.rand(len(views), generator=generator) >= settings.drop_view / 6
    images = encode_pictures(to_pictures(views), size, {name: to_pictures(values) for name, values in extra.items()})
    return (images, matrix, tangent, half_width, present), sdf, color, to_pictures(picture[None])[0]


def _pick_views(
    item: dict, drawn: bool, maps: Collection[str], generator: torch.Generator
) -> tuple[CameraRig, Tensor, dict[str, Tensor], Tensor, bool]:
    """A rig, its views `[6, 4, S, S]` and their maps `[6, C, S, S]` by name, an input picture `[4, S, S]`, all in [0, 1], and whether
    the views were drawn: they are true unless the first stage drew some.
    """
    which = int(torch.randint(len(RIGS), (), generator=generator))
    own = slice(6 * which, 6 * which + 6)
    views, number = item["views"][own], int(torch.randint(len(item["inputs"]), (), generator=generator))
    for name in maps:
        if name not in item:
            raise InputError(f"config.condition.maps: views have no {name}. Make the data set with --maps {name}.")
    extra = {name: _to_tensor(item[name][own]) for name in maps}
    drawn = drawn and "drawn" in item
    if drawn:
        which, views, number = RIGS.index(DRAWN_RIG), item["drawn"], int(item["drawn_input"])
    return CameraRig.named(RIGS[which]), _to_tensor(views), extra, _to_tensor(item["inputs"][number]), drawn


def perturb_cameras(
    matrix: Tensor,  # [V, 4, 4]
    tangent: Tensor,  # [V]
    half_width: Tensor,  # [V]
    settings: ViewSettings,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn, shift and zoom every camera a little, each on its own, as if the views did not quite agree."""
    count = len(matrix)
    angles = torch.randn(count, 3, generator=generator) * math.radians(settings.perturb_rotation)
    x, y, z = angles.unbind(-1)
    o = torch.zeros_like(x)
    skew = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).view(count, 3, 3)
    out = matrix.clone()
    out[:, :3] = torch.linalg.matrix_exp(skew) @ matrix[:, :3]
    out[:, :3, 3] += torch.randn(count, 3, generator=generator) * settings.perturb_translation
    zoom = 1 + torch.randn(count, generator=generator) * settings.perturb_focal
    return out, tangent * zoom, half_width * zoom


def _rekey(
    views: Tensor,  # [V, 4, S, S]
) -> Tensor:
    """Lose the masks on grey and key them again, `[V, 4, S, S]` in [0, 1]."""
    alpha = views[:, 3:]
    on_grey = to_pictures(views[:, :3] * alpha + (1 - alpha) * (127 / 255))
    return torch.stack([_to_tensor(torch.from_numpy(np.array(key_background(picture)))) for picture in on_grey])


def to_pictures(
    values: Tensor,  # [N, C, S, S] in [0, 1]
) -> list[Image.Image]:
    """Pictures with `C` bands."""
    arrays = (values * 255).round().byte().movedim(1, -1).squeeze(-1).numpy()
    return [Image.fromarray(array) for array in arrays]


def _to_tensor(
    pictures: Tensor,  # [..., S, S, C] uint8
) -> Tensor:
    """`[..., C, S, S]` in [0, 1]."""
    return pictures.movedim(-1, -3).float() / 255
