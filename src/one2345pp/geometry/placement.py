"""Where a picture of the front belongs beside the views of a rig: its place and size, told by their masks. Drawing lives elsewhere."""

# V views, H W pixels

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .cameras import CameraRig, project
from .framing import object_box, scaled_crop
from .volume import cell_centers


RESOLUTION = 64  # cells along an edge of the shape that the masks leave
AGREEMENT = 0.5


def front_camera(rig: CameraRig, elevation: float) -> CameraRig:
    """The camera of a placed picture, a rig of one: azimuth 0, as far away and with the same lens as the rig's first."""
    return CameraRig.from_angles([0.0], elevation, rig.fov[0].item(), rig.positions[0].norm().item())


def place_picture(
    picture: Image.Image,
    masks: np.ndarray | Tensor,  # [V, H, W]
    rig: CameraRig,
    elevation: float,
) -> tuple[Image.Image, CameraRig]:
    """Move and scale a picture of the front such that it is one more view beside those of a rig.

    The camera stands at azimuth 0, as far away and with the same lens as the rig's first. The shape that the views' masks leave
    says where the object's middle is and how high it looks from there; the picture's object is put there. Widths would not do:
    from the front the object may be as wide as from no other side.

    Args:
        picture: `RGBA`, square; where the object lies in it and how large it is does not matter.
        masks: Coverage in [0, 1] of the rig's views. They need not quite agree.
        rig: Their cameras.
        elevation: Degrees above the horizon from which the picture was taken.

    Returns:
        The picture as the camera sees it, `RGBA`, and the camera, a rig of one.

    Raises:
        InputError: If the picture, or all the views, show nothing.
    """
    own_left, own_top, own_right, own_bottom = object_box(np.asarray(picture.getchannel("A")) >= 128)
    masks = torch.as_tensor(masks).float()
    seen = (masks >= 0.5).flatten(1).any(1)
    if not seen.any():
        raise InputError("views: their masks are empty. Check that they show the object.")
    camera = front_camera(rig, elevation)
    x, y, height = _expected_box(masks[seen], rig[seen], camera)
    side = (own_bottom - own_top) / height  # of the part of the picture that fills the view, in pixels
    left, top = (own_left + own_right) / 2 - side * x, (own_top + own_bottom) / 2 - side * y
    placed = scaled_crop(picture.convert("RGBa"), (left, top, left + side, top + side), picture.width)
    return placed.convert("RGBA"), camera


def _expected_box(masks: Tensor, rig: CameraRig, camera: CameraRig) -> tuple[float, float, float]:
    """Middle x, y and height of the box of what the masks leave, as another camera would see it."""
    centers = cell_centers(torch.cartesian_prod(*[torch.arange(RESOLUTION)] * 3), RESOLUTION)
    centers = centers[centers.norm(dim=-1) < 0.5]
    uv, _ = project(centers, rig)  # [V, P, 2]
    cover = F.grid_sample(masks[:, None], uv[:, None], padding_mode="border", align_corners=False)[:, 0, 0]
    cover = torch.where((uv.abs() > 1).any(-1), 1.0, cover)  # beyond its border a view says nothing
    covered = (cover >= 0.5).sum(0)
    level = int(covered.max())
    # What all views agree on, unless that is little of what all but one do: drawn views may contradict each other.
    while level > 1 and (covered >= level).sum() < AGREEMENT * (covered >= level - 1).sum():
        level -= 1
    uv = (project(centers[covered >= level], camera)[0][0] + 1) / 2
    low, high = uv.amin(0), uv.amax(0)
    cell = 1 / RESOLUTION / (2 * camera.positions[0].norm() * camera.tan_half_fov[0])
    return *((low + high) / 2).tolist(), float(high[1] - low[1] + cell)
