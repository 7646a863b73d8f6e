"""The world of a picture: one in which a sample's object is as large, and where, as the picture shows it once it is placed.

How large a thing is that one picture shows, beside the sphere it would fill, nobody can say exactly. So the volume networks learn to
believe the picture: what they are to draw fits its outline, and it is the drawn views that are a little too large or too small. Told
the true size instead, they would have to doubt the outline by what `place_picture` is wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry.cameras import CameraRig, project
from ..geometry.placement import outline_circle


SCALES = 0.85, 1.08  # more would leave the volume: what is seen from its end and long fits the picture no longer


def surface_points(
    sdf: Tensor,  # [X, Y, Z]
) -> Tensor:
    """Where the distance crosses zero between neighbouring cells, world positions `[P, 3]`."""
    found = []
    for axis in range(3):
        a, b = sdf.narrow(axis, 0, sdf.shape[axis] - 1), sdf.narrow(axis, 1, sdf.shape[axis] - 1)
        crossing = (a < 0) != (b < 0)
        points = crossing.nonzero().float()
        points[:, axis] += a[crossing] / (a[crossing] - b[crossing])
        found.append(points)
    return (torch.cat(found) + 0.5) / sdf.shape[0] - 0.5


def to_picture(
    sdf: Tensor,  # [X, Y, Z] in units of the truncation distance
    colors: Tensor,  # [3, X, Y, Z], 0 where there is none
    mask: Tensor,  # [S, S] bool, of the placed picture
    camera: CameraRig,  # of the placed picture
) -> tuple[Tensor, Tensor]:
    """Scale and shift a volume until its outline has the middle and radius of the picture's; `sdf` and `colors` of that world."""
    points = surface_points(sdf)
    if not len(points):
        return sdf, colors
    x, y, radius = (2 * value / len(mask) for value in outline_circle(mask.numpy()))
    middle, reach = _circle(points, camera)
    scale = min(max(radius / reach, SCALES[0]), SCALES[1])
    middle, _ = _circle(points * scale, camera)
    right, up = camera.world_to_camera[0, :2, :3]
    dx, dy = (torch.tensor([x, y]) - 1 - middle) * camera.tan_half_fov[0] * camera.positions[0].norm()
    shift = dx * right - dy * up
    return warp(sdf, colors, scale, shift)


def _circle(points: Tensor, camera: CameraRig) -> tuple[Tensor, float]:
    """`outline_circle` of points, in half sides of the view."""
    uv = project(points, camera)[0][0]
    middle = (uv.amin(0) + uv.amax(0)) / 2
    return middle, (uv - middle).norm(dim=1).max().item()


def warp(
    sdf: Tensor,  # [X, Y, Z]
    colors: Tensor,  # [3, X, Y, Z]
    scale: float,
    shift: Tensor,  # [3], world
) -> tuple[Tensor, Tensor]:
    """The volume of the object `scale` times as large, then moved by `shift`; what leaves the volume is cut off."""
    has_color = (colors != 0).any(0, keepdim=True).float()
    values = torch.cat([1 - sdf[None], has_color, colors])[None]  # beyond the volume: far outside, no colour
    # positions of grid_sample are z, y, x in [-1, 1], twice the world's
    theta = torch.cat([torch.eye(3) / scale, -2 * shift.flip(0)[:, None] / scale], 1)[None]
    grid = F.affine_grid(theta, [1, 1, *sdf.shape], align_corners=False)
    values = F.grid_sample(values, grid, align_corners=False)[0]
    near = 1 - values[0]
    distance = torch.where(near.abs() > 0.99, near.sign(), near * scale).clamp(-1, 1)
    return distance, values[2:] / values[1:2].clamp(min=1e-3)
