"""Samples that the texture is fitted to: points of the surface, pixels of views, and how far those are from silhouettes."""

# R raster pixels along an edge, P points

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ...geometry.visibility import SurfaceSamples


def surface_at(mesh: trimesh.Trimesh, face_ids: np.ndarray, barycentrics: np.ndarray) -> tuple[Tensor, Tensor]:
    """Points of the surface and its interpolated unit normals there, `[P, 3]` each."""
    corners = mesh.faces[face_ids]
    weights = barycentrics[..., None].astype(np.float32)
    points = (np.asarray(mesh.vertices, np.float32)[corners] * weights).sum(1)
    normals = (np.asarray(mesh.vertex_normals, np.float32)[corners] * weights).sum(1)
    return torch.from_numpy(points), F.normalize(torch.from_numpy(normals), dim=-1)


def in_box(mesh: trimesh.Trimesh, points: Tensor) -> Tensor:
    """Points in a cube about the mesh's bounding box, in [-0.5, 0.5], where the field lives."""
    low, high = (points.new_tensor(bound) for bound in mesh.bounds)
    return (points - (low + high) / 2) / (high - low).max()


def weighted_error(colors: Tensor, samples: SurfaceSamples) -> Tensor:
    error = (colors - samples.colors).square().mean(-1)
    return (samples.weights * error).sum() / samples.weights.sum().clamp(min=1e-6)


def enlarged(view: Image.Image, size: int) -> tuple[Tensor, Tensor]:
    """Colour `[R, R, 3]` and alpha `[R, R]` in [0, 1]; colours of transparent pixels do not bleed into others."""
    rgba = torch.from_numpy(np.asarray(view, np.float32) / 255)
    alpha = rgba[..., 3:]
    premultiplied = torch.cat([rgba[..., :3] * alpha, alpha], -1).permute(2, 0, 1)[None]
    large = F.interpolate(premultiplied, size=(size, size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    return large[..., :3] / large[..., 3:].clamp(min=1e-6), large[..., 3]


def pixels_inside(mask: np.ndarray, depth: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Pixels to the nearest silhouette, `[R, R]`: the mask's border, or a jump in depth steeper than slopes that count."""
    near = np.where(mask, depth, np.inf)
    low = ndimage.minimum_filter(near, 3, mode="nearest")
    high = ndimage.maximum_filter(np.where(mask, depth, -np.inf), 3, mode="nearest")
    jump = mask & (high - low > 10 * np.where(mask, pixel, 1))
    return ndimage.distance_transform_edt(np.pad(mask & ~jump, 1))[1:-1, 1:-1]
