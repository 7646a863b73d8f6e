"""A volume with the outline of a picture: what stands out of it is cut, what it lacks is put where the volume nearly has it."""

# X Y Z grid, P cells, H W rays, D samples along a ray

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor

from .cameras import CameraRig, project
from .extract import solid_sdf
from .framing import object_box
from .volume import SparseVolume, cell_centers


MARGIN = 0.5  # cells that the surface may stand out of the outline
FRINGE = 1.5  # cells next to a covered ray that what the volume has grows into; beyond, something is missing
THICKNESS = 1.0  # cells, half that of what is missing
REACH = 0.8  # share of the truncation: a ray that stays further away from any surface does not say where one is
MIDDLE = 0.06  # world units that a surface is believed further away for each that it lies off the volume's middle
PULL = 4.0  # of a ray that meets a surface on its own depth, against the pull of a neighbour's
MOST_RAYS = 192  # along a side of the view; else three for two cells


def fit_outline(volume: SparseVolume, picture: Image.Image, camera: CameraRig) -> SparseVolume:
    """Give a volume the outline of one picture that can be believed.

    Where the picture shows nothing there is nothing: distances are at least those to the cone of its outline. Where it shows
    something, each ray says at which depth the volume comes nearest to a surface, in doubt in the middle. If the volume lacks little,
    what is nearest to the ray grows. If it lacks a whole part, such as a leg, a sheet two cells thick is put there: rays that meet a
    surface, or nearly do, say at which depth, and between them it bends as little as it can. A part of the outline that no such ray
    crosses stays empty, and what the picture does not show stays as it is.

    Args:
        volume: Signed distance and colour, negative inside.
        picture: `RGBA`, square, as `camera` sees it.
        camera: A rig of one.

    Returns:
        The volume on its own cells and all that are nearer to the new surface than the truncation. Colours of new cells are
        their nearest old ones'.

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
    away = _in_world(_sampled(outline, uv), depth, camera)  # from the outline's cone

    # 1. What the rays through the picture's object meet
    nearest, where = _nearest_along_rays(grid, camera, min(3 * volume.resolution // 2, MOST_RAYS))
    shown = _resized(outline, len(where))
    inside, ray = shown < 0, _in_world(2, where, camera) / len(where)  # world units that a ray is wide
    lacking = inside & (nearest > 0)
    missing = _beyond(inside & ~lacking, lacking, FRINGE * cell / ray.mean().item())

    # 2. What the picture shows and the volume lacks by little
    wanted = _in_world(shown, where, camera).clamp(min=-cell)
    little = (nearest - wanted).clamp(min=0) * (inside & ~missing & (nearest < FRINGE * cell))
    distance = grid.flatten()
    among = (1 - (distance - _sampled(nearest, uv)) / (2 * cell)).clamp(0, 1)  # of the ray's nearest cells
    distance = distance - _sampled(little, uv) * among

    # 3. What it lacks altogether
    if missing.any():
        sheet = _bridging_sheet(nearest / (REACH * volume.truncation), where, inside, missing, ray, uv, depth)
        distance = torch.minimum(distance, torch.maximum(sheet - THICKNESS * cell, away - MARGIN * cell))

    # 4. What it has and the picture does not show
    distance = torch.maximum(distance, away - MARGIN * cell).clamp(-volume.truncation, volume.truncation)
    return _with_distances(volume, distance.view(grid.shape))


def _outline_distance(picture: Image.Image) -> Tensor:
    """Signed distance to the picture's outline, negative in it, in half sides of the view, `[S, S]`."""
    inside = np.asarray(picture.convert("RGBA").getchannel("A")) >= 128
    object_box(inside)  # raises if there is none
    pixels = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    return torch.from_numpy((pixels - 0.5 * np.sign(pixels)) * 2 / picture.width).float()


def _in_world(lengths: Tensor | float, depth: Tensor, camera: CameraRig) -> Tensor:
    """World units of `lengths` in half sides of the view, at depths along its axis."""
    return lengths * depth * camera.tan_half_fov[0] + lengths * camera.half_width[0]


def _nearest_along_rays(grid: Tensor, camera: CameraRig, rays: int) -> tuple[Tensor, Tensor]:
    """The smallest distance along each ray of the view, and the depth where it is; `[rays, rays]` both."""
    side = (torch.arange(rays) + 0.5) / rays * 2 - 1
    v, u = torch.meshgrid(side, side, indexing="ij")
    tangent, half_width, middle = camera.tan_half_fov[0], camera.half_width[0], camera.positions[0].norm()
    steps = 2 * grid.shape[0]
    depth = middle + (torch.arange(steps) + 0.5) / steps * math.sqrt(3) - math.sqrt(3) / 2  # the diagonal of the volume
    directions = torch.stack([u * tangent, -v * tangent, -torch.ones_like(u)], -1)  # [H, W, 3], camera's axes
    origins = torch.stack([u * half_width, -v * half_width, torch.zeros_like(u)], -1)
    points = depth.view(-1, 1, 1, 1) * directions + origins
    matrix = camera.world_to_camera[0]
    points = (points - matrix[:3, 3]) @ matrix[:3, :3]
    where = 2 * points.flip(-1)[None]
    values = F.grid_sample(grid[None, None], where, padding_mode="border", align_corners=False)[0, 0]
    outside = (points.abs() > 0.5 - 2 / grid.shape[0]).any(-1)  # at the border distances are extended, and say little
    doubt = MIDDLE * (depth - middle).abs().view(-1, 1, 1)
    index = (values + doubt).masked_fill(outside, math.inf).argmin(0, keepdim=True)
    nearest = values.masked_fill(outside, 1.0).gather(0, index)[0]
    return nearest, depth[index[0]]


def _beyond(covered: Tensor, lacking: Tensor, radius: float) -> Tensor:
    """The `lacking` rays further than `radius` rays from the `covered` ones, and those that join them to these; all `[H, W]`."""
    core = lacking & (torch.from_numpy(ndimage.distance_transform_edt(~covered)) > radius)
    if not core.any():
        return core
    return lacking & (torch.from_numpy(ndimage.distance_transform_edt(~core)) <= radius + 1)


def _bridging_sheet(
    doubt: Tensor,  # [H, W], as `where` and `inside` see `_bridge_depths`
    where: Tensor,  # [H, W]
    inside: Tensor,  # [H, W]
    missing: Tensor,  # [H, W] bool
    ray: Tensor,  # [H, W] world units that each is wide
    uv: Tensor,  # [P, 2]
    depth: Tensor,  # [P]
) -> Tensor:
    """How far each cell lies from a surface through the missing rays, `[P]` world units; infinite where there is none."""
    where, known = _bridge_depths(doubt, where, inside)
    slope = torch.stack(torch.gradient(where)).div(ray).norm(dim=0)
    added = torch.from_numpy(ndimage.binary_dilation((missing & known).numpy())).float()
    added, where, slope = (_sampled(image, uv) for image in (added, where, slope))
    return torch.where(added > 0.5, (depth - where).abs() / (1 + slope**2).sqrt(), math.inf)


def _bridge_depths(doubt: Tensor, where: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The depth of what each ray shows: that of the surface that it meets, and between such rays the one that bends least.

    Neighbours `i`, `j` pull on each other's depths, and each ray's own one `w`: the smallest sum of `(d_i - d_j)^2` and
    `PULL (1 - doubt_i)^2 (d_i - w_i)^2`.

    Args:
        doubt: How far a ray stays from any surface, 0 or less where it meets one, 1 where that says nothing, `[H, W]`.
        where: The depth where it comes nearest to one, `[H, W]`.
        inside: Whether it shows the object, `[H, W]`.

    Returns:
        Depths, `[H, W]`, and for which rays they are known: in a part of the outline where no ray comes near to a surface, for none.
    """
    trust = np.where(inside, (1 - doubt).clamp(0, 1) ** 2, 0.0)
    parts, _ = ndimage.label(inside)
    known = np.isin(parts, np.unique(parts[trust > 0])) & inside.numpy()
    number = np.where(known, np.cumsum(known).reshape(known.shape) - 1, -1)
    sides = [(number[:, :-1], number[:, 1:]), (number[:-1], number[1:])]
    first, second = (np.concatenate([pair[k].ravel() for pair in sides]) for k in (0, 1))
    joined = (first >= 0) & (second >= 0)
    first, second = first[joined], second[joined]
    links = sparse.coo_matrix((np.ones(len(first)), (first, second)), [known.sum()] * 2)
    links = links + links.T
    weight = PULL * trust[known]
    matrix = sparse.diags(np.asarray(links.sum(1)).ravel() + weight) - links
    depths = where.double().numpy().copy()
    if known.any():
        depths[known] = spsolve(matrix.tocsc(), weight * depths[known])
        nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        depths = depths[tuple(nearest)]
    return torch.from_numpy(depths).float(), torch.from_numpy(known)


def _resized(image: Tensor, size: int) -> Tensor:
    return F.interpolate(image[None, None], size=(size, size), mode="bilinear", antialias=True)[0, 0]


def _sampled(image: Tensor, uv: Tensor) -> Tensor:
    """Values of `image [H, W]` at `uv [P, 2]`, `[P]`; beyond it those of its border."""
    return F.grid_sample(image[None, None], uv[None, None], padding_mode="border", align_corners=False)[0, 0, 0]


def _with_distances(volume: SparseVolume, grid: Tensor) -> SparseVolume:
    """The volume with other distances, `[X, Y, Z]`, on its own cells and those near the new surface.

    Far from any surface small distances may be no more than what `solid_sdf` made up there, so they do not count.
    """
    inside = (grid < 0).numpy()
    cells = np.where(inside, *(ndimage.distance_transform_edt(side) for side in (inside, ~inside)))  # to the other side
    near = torch.from_numpy(cells <= volume.truncation * volume.resolution + 1)
    known = torch.zeros_like(near)
    known[tuple(volume.coords.T)] = True
    coords = (known | (near & (grid.abs() < volume.truncation))).nonzero()
    colors = torch.zeros(*grid.shape, 3, dtype=volume.colors.dtype)
    colors[tuple(volume.coords.T)] = volume.colors
    x, y, z = coords.unbind(1)
    origin = ndimage.distance_transform_edt(~known.numpy(), return_distances=False, return_indices=True)
    nearest = torch.from_numpy(origin)[:, x, y, z]
    return SparseVolume(coords, grid[x, y, z], colors[tuple(nearest)], volume.resolution, volume.truncation)
