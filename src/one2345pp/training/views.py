"""What the volume networks are conditioned on while they learn: true views made as imperfect as drawn ones. Losses live elsewhere."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.prepare import NADIR, RIGS
from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.placement import place_picture
from ..models.condition_encoder import DRAWN, GIVEN, PICTURE, VIEW_KINDS, ViewBatch, views_to_images
from ..pipelines.preprocess import key_background
from .picture_world import to_picture


DEFAULTS = {
    "image_size": 96,
    "normals": False,  # views have those of `prepare --normals` as channels 5 to 7
    "drawn": 0.5,  # probability of the views that a first stage drew, of samples that have some
    "picture": 0.85,  # probability that drawn views have the picture beside them that they were drawn of
    "elevation_error": 6.0,  # degrees, standard deviation: what the chain takes for the picture's elevation is an estimate
    "mirror": 0.5,  # probability
    "recolor": 0.2,  # probability of permuting the colour channels
    "rekey": 0.4,  # probability that the masks come from keying a grey background, as for a generated tile
    "blur": 0.3,  # probability of views of a lower resolution
    "drop_view": 0.1,  # how many of six views are missing on average: each, and the picture, with a sixth of this probability
    "perturb": 0.5,  # probability of perturbed projections (One-2-3-45++ section 3.2)
    "perturb_rotation": 0.7,  # degrees, standard deviation
    "perturb_translation": 0.008,  # world units
    "perturb_focal": 0.01,  # share
}
DRAWN_RIG = "zero123plus-v1.2"  # of first stages
CHANCES = ("drawn", "picture", "mirror", "recolor", "rekey", "blur", "drop_view", "perturb")


class SampleBatch:
    """Items of a `PreparedDataset` as tensors in one random world: mirrored or not, recoloured or not.

    Samples that show a picture beside views drawn of it are in that picture's world, see `picture_world`.

    Attributes:
        views: `ViewBatch` of `B` samples.
        sdf: `[B, X, Y, Z]`, in units of the truncation distance, -1 to 1.
        colors: `[B, 3, X, Y, Z]` in [-1, 1], 0 outside the band.
        inputs: One input picture a sample, `[B, 4, S, S]` in [0, 1], straight alpha.
    """

    def __init__(self, items: list[dict], config: dict, generator: torch.Generator):
        def chance(key: str) -> bool:
            return torch.rand((), generator=generator).item() < config[key]

        samples, sdfs, colors, inputs = [], [], [], []
        for item in items:
            rig, views, picture, kind = _pick_views(item, chance("drawn"), config["normals"], generator)
            kinds, groups = [kind] * len(views), [views]  # the picture that views are drawn of is a group of its own
            sdf = item["sdf"].float() / 127
            color = torch.zeros(3, *sdf.shape)
            x, y, z = item["coords"].T
            color[:, x, y, z] = item["colors"].T.float() / 127.5 - 1
            if kind == DRAWN and chance("picture"):
                error = config["elevation_error"] * torch.randn((), generator=generator).item()
                placed, camera = _placed_picture(item, rig, error)
                kinds.append(PICTURE)
                groups.append(placed)
                rig = CameraRig.cat([rig, camera])
                sdf, color = to_picture(sdf, color, placed[0, 3] >= 0.5, camera)
            matrix, tangent = rig.world_to_camera, rig.tan_half_fov
            if chance("mirror"):
                groups, picture = [group.flip(-1) for group in groups], picture.flip(-1)
                sdf, color = sdf.flip(0), color.flip(1)
                groups[0][:, 4:5] = 1 - groups[0][:, 4:5]  # normals point the other way across
                flip = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
                matrix = flip @ matrix @ flip
            if chance("recolor"):
                order = torch.randperm(3, generator=generator)
                color, picture = color[order], torch.cat([picture[order], picture[3:]])
                groups = [torch.cat([group[:, order], group[:, 3:]], 1) for group in groups]
            if chance("rekey") and kind == GIVEN:  # drawn ones are
                groups[0] = _rekey(groups[0])
            if chance("blur"):
                small = int(torch.randint(32, 72, (), generator=generator))
                groups[0] = F.interpolate(groups[0], size=small, mode="area")
            if chance("perturb"):
                matrix, tangent = perturb_cameras(matrix, tangent, config, generator)
            keep = torch.rand(len(kinds), generator=generator) >= config["drop_view"] / 6
            images = torch.cat([_resize(views_to_images(group), config["image_size"]) for group in groups])
            samples.append((images, matrix, tangent, keep, torch.tensor([VIEW_KINDS.index(kind) for kind in kinds])))
            sdfs.append(sdf)
            colors.append(color)
            inputs.append(picture)
        images, matrices, tangents, present, kinds = (_padded(parts) for parts in zip(*samples, strict=True))
        self.views = ViewBatch(images, matrices, tangents, present, None, kinds)
        self.sdf, self.colors, self.inputs = torch.stack(sdfs), torch.stack(colors), torch.stack(inputs)


def _padded(
    parts: tuple[Tensor, ...],  # [V_b, ...]
) -> Tensor:
    """One tensor, `[B, V, ...]`, of samples with six or seven views; what is padded is zero, so absent."""
    most = max(len(part) for part in parts)
    return torch.stack([torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])]) for part in parts])


def _pick_views(
    item: dict, drawn: bool, normals: bool, generator: torch.Generator
) -> tuple[CameraRig, Tensor, Tensor, str]:
    """A rig, its views `[6, 4 or 7, S, S]` and an input picture `[4, S, S]`, in [0, 1], and the views' kind.

    They are true unless the first stage drew some.
    """
    kind = GIVEN
    which = int(torch.randint(len(RIGS), (), generator=generator))
    views = item["views"][6 * which : 6 * which + 6]
    if normals:
        if "normals" not in item or "drawn" in item:
            raise InputError("config: views have no normals. Make the data set with --normals, and draw no samples.")
        views = torch.cat([views, item["normals"][6 * which : 6 * which + 6]], -1)
    number = int(torch.randint(len(item["inputs"]), (), generator=generator))
    if drawn and "drawn" in item:
        which, views, number = RIGS.index(DRAWN_RIG), item["drawn"], int(item["drawn_input"])
        kind = DRAWN
    picture = item["inputs"][number].movedim(-1, 0).float() / 255
    return CameraRig.named(RIGS[which]), views.movedim(-1, 1).float() / 255, picture, kind


def _placed_picture(item: dict, rig: CameraRig, error: float) -> tuple[Tensor, CameraRig]:
    """The picture that views were drawn of, `[1, 4, S, S]` in [0, 1], as the chain places it beside them, and its camera."""
    number = int(item["drawn_input"])
    elevation = int(item["elevations"][number]) + NADIR + error
    placed, camera = place_picture(Image.fromarray(item["inputs"][number].numpy()), rig, elevation)
    return torch.from_numpy(np.array(placed)).movedim(-1, 0)[None].float() / 255, camera


def perturb_cameras(
    matrix: Tensor,  # [V, 4, 4]
    tangent: Tensor,  # [V]
    config: dict,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Turn, shift and zoom every camera a little, each on its own, as if the views did not quite agree."""
    count = len(matrix)
    angles = torch.randn(count, 3, generator=generator) * math.radians(config["perturb_rotation"])
    x, y, z = angles.unbind(-1)
    o = torch.zeros_like(x)
    skew = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).view(count, 3, 3)
    out = matrix.clone()
    out[:, :3] = torch.linalg.matrix_exp(skew) @ matrix[:, :3]
    out[:, :3, 3] += torch.randn(count, 3, generator=generator) * config["perturb_translation"]
    return out, tangent * (1 + torch.randn(count, generator=generator) * config["perturb_focal"])


def _rekey(views: Tensor) -> Tensor:
    """Lose the masks on grey and key them again, `[V, C, S, S]` in [0, 1]."""
    alpha = views[:, 3:4]
    rgb = views[:, :3] * alpha + (1 - alpha) * (127 / 255)
    pictures = (rgb * 255).round().byte().movedim(1, -1).numpy()
    keyed = [np.asarray(key_background(Image.fromarray(picture))) for picture in pictures]
    return torch.cat([torch.from_numpy(np.stack(keyed)).movedim(-1, 1).float() / 255, views[:, 4:]], 1)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
