"""What views see of a surface: points with the colours seen there, and maps of trust. Who sees, and who paints, lives in `pipelines`.

Axes: V views, R raster pixels along an edge, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cameras import CameraRig, project


@dataclass
class SurfaceSamples:
    """Points on the mesh and what colour they should have.

    Args:
        points: World, `[P, 3]`.
        normals: Unit surface normals, `[P, 3]`.
        directions: Unit vectors towards the eye that saw the colour, `[P, 3]`.
        colors: sRGB in [0, 1], `[P, 3]`.
        weights: Trust in the colour, `[P]`, 0 and more.
    """

    points: Tensor
    normals: Tensor
    directions: Tensor
    colors: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def mean_color(self) -> Tensor:
        """Mean of the colours by their weights, `[3]`."""
        return (self.weights[:, None] * self.colors).sum(0) / self.weights.sum().clamp(min=1e-6)

    def sample(self, count: int, generator: torch.Generator | None) -> SurfaceSamples:
        """`count` of the samples at random, with replacement."""
        index = torch.randint(len(self), (count,), generator=generator).to(self.points.device)
        fields = (self.points, self.normals, self.directions, self.colors, self.weights)
        return SurfaceSamples(*(field[index] for field in fields))

    def to(self, device: torch.device | str) -> SurfaceSamples:
        fields = (self.points, self.normals, self.directions, self.colors, self.weights)
        return SurfaceSamples(*(field.to(device) for field in fields))


@dataclass
class Visibility:
    """What each view sees of the mesh, as maps that any surface point can be looked up in.

    Args:
        rig: `V` cameras.
        weights: Trust in each pixel, `[V, R, R]`: falls to 0 where the surface turns away and at every silhouette.
        depth: Along the optical axis, `[V, R, R]`, infinite where the mesh is not hit.
    """

    rig: CameraRig
    weights: Tensor
    depth: Tensor

    def confidence(
        self,
        points: Tensor,  # [P, 3]
        normals: Tensor,  # [P, 3]
    ) -> Tensor:
        """How well the views together see points of the surface, `[P]`: 0 unseen, 1 seen head-on by one view."""
        uv, depth = project(points, self.rig)  # [V, P, 2], [V, P]
        lookup = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}
        weight = F.grid_sample(self.weights[:, None], uv[:, None], **lookup)[:, 0, 0]
        seen = F.grid_sample(self.depth[:, None].nan_to_num(posinf=1e6), uv[:, None], **{**lookup, "mode": "nearest"})
        # three pixels of depth forgive the slope of all surfaces that have any weight
        tolerance = 3 * 2 * self.rig.half_extent(depth) / self.depth.shape[-1]
        to_eye = self.rig.directions_to(points)
        facing = (to_eye * normals).sum(-1)  # tells the sides of a thin plate apart, which depth cannot
        visible = (depth > 0) & ((seen[:, 0, 0] - depth).abs() < tolerance)
        return (weight * visible * (4 * facing).clamp(0, 1)).sum(0)
