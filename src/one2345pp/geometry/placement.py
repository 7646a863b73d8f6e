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
from .volume import cell_centers


RESOLUTION = 64  # cells along an edge of the shape that the masks leave
AGREEMENT = 0.5


def place_picture(
    picture: Image.Image,
    masks: np.ndarray | Tensor,  # [V, H, W]
    rig: CameraRig,
    elevation: float,
) -> tuple[Image.Image, CameraRig]:
    """Move and scale a picture of the front such that it is one more view beside those of a rig.

    The camera stands at azimuth 0, as far away and with the same lens as the rig's first. The boxes of the views' masks say where
    the object's middle is and how high it looks from there; the picture's object is put there. Widths would not do: from the front
    the object may be as wide as from no other side.

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
    own = _box(np.asarray(picture.getchannel("A")) / 255)
    if own is None:
        raise InputError("image: is fully transparent. Pass a picture whose object is opaque.")
    boxes = [_box(np.asarray(mask)) for mask in masks]
    seen = [index for index, box in enumerate(boxes) if box is not None]
    if not seen:
        raise InputError("views: their masks are empty. Check that they show the object.")
    camera = CameraRig.from_angles([0.0], elevation, rig.fov[0].item(), rig.positions[0].norm().item())
    x, y, height = _expected_box(torch.as_tensor(masks).float()[seen], rig[seen], camera)
    zoom = own[3] / height  # share of the picture that fills the view
    left, top = own[0] - zoom * x, own[1] - zoom * y
    return _crop(picture, left, top, zoom), camera


def _box(
    mask: np.ndarray,  # [H, W]
) -> tuple[float, float, float, float] | None:
    """Middle x, y, width and height of what is covered, as shares of the picture's side; `None` if nothing is."""
    rows, columns = (np.flatnonzero((mask >= 0.5).any(axis)) for axis in (1, 0))
    if len(rows) == 0:
        return None
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    side = len(mask)
    return (left + right) / 2 / side, (top + bottom) / 2 / side, (right - left) / side, (bottom - top) / side


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


def _crop(picture: Image.Image, left: float, top: float, zoom: float) -> Image.Image:
    """The square at `left`, `top` with a side of `zoom`, all shares of the picture's side, at its size; nothing beyond its border."""
    side = picture.width
    source = picture.convert("RGBa")
    if zoom > 1:  # shrink by averages before sampling
        small = max(1, round(side / zoom))
        source = source.resize((small, small), Image.Resampling.BOX)
    step = zoom * source.width / side
    box = (step, 0, left * source.width, 0, step, top * source.width)
    return source.transform((side, side), Image.Transform.AFFINE, box, Image.Resampling.BILINEAR).convert("RGBA")
