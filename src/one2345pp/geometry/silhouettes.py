"""What silhouettes say about a volume: where a view sees no object there is none. Baselines without networks live in `evaluation`.

Axes: V views, S pixels, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from .cameras import CameraRig, project
from .volume import SparseVolume, cell_centers


AGREEMENT_SIZE = 48  # pixels: one is wider than a cell of 64, so cells inside leave no gaps
AGREEMENT = 0.99  # of silhouettes that may carve; those of true views of 33 objects had at least 0.997


def hull_distance(
    masks: Sequence[np.ndarray],  # V times [S, S]
    rig: CameraRig,
    points: Tensor,  # [P, 3]
) -> Tensor:
    """Signed distance to the visual hull in world units, `[P]`, negative inside: the largest of the distances to the outlines.

    A distance in a view is that to its outline in pixels, times what a pixel measures at the point's depth; so it is exact for
    points that see the outline squarely. Beyond an image's border, and where all views are, nothing is known: -inf.

    Args:
        masks: Coverage in [0, 1], each of its own size. An outline between two pixels lies where the coverage is one half.
        rig: The views' cameras.
        points: Places in the world.
    """
    uv, depth = project(points, rig)
    out = torch.full((len(points),), -torch.inf)
    for view, mask in enumerate(masks):
        inside = mask >= 0.5
        distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
        distance -= np.sign(distance) * 0.5  # to the border between pixels, not to a centre
        soft = (mask > 0) & (mask < 1) & (np.abs(distance) < 1)
        distance = np.where(soft, 0.5 - mask, distance)
        grid = torch.from_numpy(distance).float()[None, None]
        pixels = F.grid_sample(grid, uv[view][None, None], padding_mode="border", align_corners=False)[0, 0, 0]
        known = (uv[view].abs() <= 1).all(-1) & (depth[view] > 0)
        size = 2 * depth[view] * rig.tan_half_fov[view] / mask.shape[-1]
        out = torch.maximum(out, torch.where(known, pixels * size, -torch.inf))
    return out


def agreement(masks: Sequence[np.ndarray], rig: CameraRig, resolution: int = 64) -> float:
    """How far silhouettes agree, 0 to 1: the share of their pixels that their visual hull covers, mean over views.

    True views of one object have about 1: the object lies in the hull, and it covers them.
    """
    axis = torch.arange(resolution)
    points = cell_centers(torch.cartesian_prod(axis, axis, axis), resolution)
    points = points[hull_distance(masks, rig, points) < 0.5 / resolution]
    uv, _ = project(points, rig)
    shares = []
    for view, mask in enumerate(masks):
        small = (
            F.interpolate(torch.from_numpy(mask).float()[None, None], (AGREEMENT_SIZE,) * 2, mode="area")[0, 0] > 0.5
        )
        pixels = ((uv[view] + 1) / 2 * AGREEMENT_SIZE).floor().long()
        pixels = pixels[((pixels >= 0) & (pixels < AGREEMENT_SIZE)).all(-1)]
        covered = torch.zeros_like(small)
        covered[pixels[:, 1], pixels[:, 0]] = True
        if small.any():
            shares.append((covered & small).sum().item() / small.sum().item())
    return float(np.mean(shares)) if shares else 0.0


def carve(volume: SparseVolume, masks: Sequence[np.ndarray], rig: CameraRig, margin: float) -> SparseVolume:
    """The volume without what lies more than `margin` (world units) outside the silhouettes' visual hull."""
    points = cell_centers(volume.coords, volume.resolution)
    limit = (hull_distance(masks, rig, points) - margin).clamp(-volume.truncation, volume.truncation)
    return replace(volume, sdf=torch.maximum(volume.sdf, limit.to(volume.sdf)))
