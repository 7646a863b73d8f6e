"""The colour field of texture refinement, a TensoRF of appearance only. Fitting and baking live in the pipeline.

The geometry is a given mesh, so there is no density branch. Axes: P points, C components, R grid cells along an edge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


# For each of the three products: the two axes of the plane, and the axis of the line.
PLANE_AXES = ((0, 1), (0, 2), (1, 2))
LINE_AXES = (2, 1, 0)


class ColorField(ModelMixin, ConfigMixin):
    """Colour of a point seen from a direction: vector-matrix decomposition, then a small MLP.

    Args:
        resolution: Grid cells along an edge (TensoRF: 128 growing to 300).
        components: Components of each of the three plane-line products (TensoRF: 48).
        feature_channels: Width of the features given to the MLP (TensoRF: 27).
        hidden: Width of the MLP's two hidden layers (TensoRF: 128).
        frequencies: Octaves of the encodings of features and direction (TensoRF: 2).

    Source: TensoRF (Chen et al., 2022), vector-matrix decomposition with the `MLP_Fea` shading; One-2-3-45++
    section 3.3.
    """

    @register_to_config
    def __init__(
        self,
        resolution: int = 128,
        components: int = 48,
        feature_channels: int = 27,
        hidden: int = 128,
        frequencies: int = 2,
    ):
        super().__init__()
        self.planes = nn.Parameter(torch.zeros(3, components, resolution, resolution))
        self.lines = nn.Parameter(torch.zeros(3, components, resolution, 1))
        self.basis = nn.Linear(3 * components, feature_channels, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear((feature_channels + 3) * (1 + 2 * frequencies), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 3),
        )

    def initialize(self, generator: torch.Generator | None = None) -> ColorField:
        """Draw every weight from a CPU `generator`: grids 0.1 * randn, linear layers Kaiming-uniform, zero biases."""
        with torch.no_grad():
            for grid in (self.planes, self.lines):
                grid.copy_(0.1 * torch.randn(grid.shape, generator=generator))
            for layer in (self.basis, *(m for m in self.mlp if isinstance(m, nn.Linear))):
                bound = layer.in_features**-0.5
                layer.weight.copy_((torch.rand(layer.weight.shape, generator=generator) * 2 - 1) * bound)
                if layer.bias is not None:
                    layer.bias.zero_()
        return self

    def start_at(
        self,
        color: Tensor,  # [3] in [0, 1]
    ) -> ColorField:
        """Make a colour that of every point, nearly: on the way from grey to dark ones the sigmoid can saturate for good."""
        with torch.no_grad():
            self.mlp[-1].bias.copy_(torch.logit(color, eps=0.02))
        return self

    def forward(
        self,
        points: Tensor,  # [P, 3]
        directions: Tensor,  # [P, 3]
    ) -> Tensor:
        """Colours of points.

        Args:
            points: `[P, 3]`, in the cube [-0.5, 0.5]^3 that the field fills; points beyond take the border's value.
            directions: Unit vectors from the surface towards the eye, `[P, 3]`.

        Returns:
            sRGB `[P, 3]` in (0, 1).
        """
        features = self.basis(self._products(points * 2))
        encoded = torch.cat([features, directions, self._encode(features), self._encode(directions)], -1)
        return torch.sigmoid(self.mlp(encoded))

    def total_variation(self) -> Tensor:
        """Mean squared difference between neighbouring cells of the planes and lines."""
        planes, lines = self.planes, self.lines
        down, right = planes.diff(dim=2), planes.diff(dim=3)
        return down.square().mean() + right.square().mean() + lines.diff(dim=2).square().mean()

    def _products(
        self,
        points: Tensor,  # [P, 3] in [-1, 1]
    ) -> Tensor:
        """Plane times line, `[P, 3 C]`; grid points sit on the cube's faces (`align_corners=True`)."""
        on_planes = torch.stack([points[:, list(axes)] for axes in PLANE_AXES])[:, :, None]  # [3, P, 1, 2]
        along = torch.stack([points[:, axis] for axis in LINE_AXES])
        on_lines = torch.stack([torch.zeros_like(along), along], -1)[:, :, None]  # a line is a plane one cell wide
        sample = {"mode": "bilinear", "padding_mode": "border", "align_corners": True}
        planes = F.grid_sample(self.planes, on_planes, **sample)[..., 0]  # [3, C, P]
        lines = F.grid_sample(self.lines, on_lines, **sample)[..., 0]
        return (planes * lines).flatten(0, 1).T

    def _encode(self, values: Tensor) -> Tensor:
        """Sines and cosines of `frequencies` octaves, `[P, 2 * frequencies * values]`."""
        octaves = 2.0 ** torch.arange(self.config.frequencies, device=values.device, dtype=values.dtype)
        angles = (values[..., None] * octaves).flatten(-2)
        return torch.cat([angles.sin(), angles.cos()], -1)
