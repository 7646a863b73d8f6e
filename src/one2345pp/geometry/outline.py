"""A volume with the outline of a picture: what stands out of it is cut, what it lacks is put where the volume nearly has it."""

# X Y Z grid, H W pixels, D samples along a ray

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor

from .cameras import CameraRig, project
from .extract import solid_sdf
from .framing import object_box
from .volume import SparseVolume, cell_centers


MARGIN = 0.5  # cells that the surface may stand out of the outline
THICKNESS = 1.0  # cells, the largest distance from the surface inside what is added
REACH = 0.8  # a ray that stays further away from any surface than this share of the truncation is left empty
MIDDLE = 0.06  # world units that a surface is believed further away for each that it lies off the volume's middle
MOST_RAYS = 192  # along a side of the view; else three for two cells


def fit_outline(volume: SparseVolume, picture: Image.Image, camera: CameraRig) -> SparseVolume:
    """Give a volume the outline of one picture that can be believed.

    Where the picture shows nothing there is nothing: distances are at least those to the outline's cone. Where it shows something that
    the volume lacks, each ray through it says at which depth the volume comes nearest to a surface, in doubt in the middle, and there
    the distance is lowered: to half the width of the outline at that place, at most a cell. What the picture does not show stays.

    Args:
        volume: Signed distance and colour, negative inside.
        picture: `RGBA`, square, as `camera` sees it.
        camera: A rig of one.

    Returns:
        The volume on all cells nearer to the new surface than the truncation. Colours of new cells are their nearest old ones'.

    Raises:
        InputError: If the picture shows nothing.
    """
    cell = 1 / volume.resolution
    grid = torch.from_numpy(solid_sdf(volume)).float()
    outline = _outline_distance(picture)  # half sides of the view
    axis = torch.arange(volume.resolution)
    cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    uv, depth = project(cell_centers(cells, volume.resolution), camera)
    uv, depth = uv[0], depth[0]
    tangent = camera.tan_half_fov[0]  # times a depth: world units that half a side of the view shows
    away = _sampled(outline, uv) * depth * tangent

    # what the picture shows and the volume lacks
    nearest, where = _nearest_along_rays(grid, camera, min(3 * volume.resolution // 2, MOST_RAYS))  # [H, W] each
    wanted = (_resized(outline, len(where)) * where * tangent).clamp(min=-THICKNESS * cell)
    lacking = (nearest - wanted).clamp(min=0) * (wanted < 0) * (nearest < REACH * volume.truncation)
    missing, nearest, where = (_sampled(image, uv) for image in (lacking, nearest, where))
    distance = grid.flatten()
    share = (1 - (distance - nearest) / (2 * cell)).clamp(0, 1)  # of the ray's nearest cells
    share = share * (2.5 - (depth - where).abs() / cell).clamp(
        0, 1
    )  # at one depth: where nothing is known, all are as near
    distance = distance - missing * share

    # what the volume has and the picture does not show
    distance = torch.maximum(distance, away - MARGIN * cell).clamp(-volume.truncation, volume.truncation)
    return _with_distances(volume, distance.view(grid.shape))


def _outline_distance(picture: Image.Image) -> Tensor:
    """Signed distance to the picture's outline, negative in it, in half sides of the view, `[S, S]`."""
    inside = np.asarray(picture.convert("RGBA").getchannel("A")) >= 128
    object_box(inside)  # raises if there is none
    pixels = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    return torch.from_numpy((pixels - 0.5 * np.sign(pixels)) * 2 / picture.width).float()


def _nearest_along_rays(grid: Tensor, camera: CameraRig, rays: int) -> tuple[Tensor, Tensor]:
    """The smallest distance along each ray of the view, and the depth where it is; `[rays, rays]` both."""
    side = (torch.arange(rays) + 0.5) / rays * 2 - 1
    v, u = torch.meshgrid(side, side, indexing="ij")
    tangent, middle = camera.tan_half_fov[0], camera.positions[0].norm()
    steps = 2 * grid.shape[0]
    depth = middle + (torch.arange(steps) + 0.5) / steps * math.sqrt(3) - math.sqrt(3) / 2  # the diagonal of the volume
    directions = torch.stack([u * tangent, -v * tangent, -torch.ones_like(u)], -1)  # [H, W, 3], camera's axes
    points = depth.view(-1, 1, 1, 1) * directions
    matrix = camera.world_to_camera[0]
    points = (points - matrix[:3, 3]) @ matrix[:3, :3]
    where = 2 * points.flip(-1)[None]
    values = F.grid_sample(grid[None, None], where, padding_mode="border", align_corners=False)[0, 0]
    outside = (points.abs() > 0.5 - 2 / grid.shape[0]).any(-1)  # at the border distances are extended, and say little
    doubt = MIDDLE * (depth - middle).abs().view(-1, 1, 1)
    index = (values + doubt).masked_fill(outside, math.inf).argmin(0, keepdim=True)
    nearest = values.masked_fill(outside, 1.0).gather(0, index)[0]
    return nearest, depth[index[0]]


def _resized(image: Tensor, size: int) -> Tensor:
    return F.interpolate(image[None, None], size=(size, size), mode="bilinear", antialias=True)[0, 0]


def _sampled(image: Tensor, uv: Tensor) -> Tensor:
    """Values of `image [H, W]` at `uv [P, 2]`, `[P]`; beyond it those of its border."""
    return F.grid_sample(image[None, None], uv[None, None], padding_mode="border", align_corners=False)[0, 0, 0]


def _with_distances(volume: SparseVolume, grid: Tensor) -> SparseVolume:
    """The volume with other distances, `[X, Y, Z]`."""
    active = grid.abs() < volume.truncation
    active[tuple(volume.coords.T)] = True
    coords = active.nonzero()
    origin = cKDTree(volume.coords.numpy()).query(coords.numpy())[1]
    x, y, z = coords.unbind(1)
    return SparseVolume(coords, grid[x, y, z], volume.colors[origin], volume.resolution, volume.truncation)
