"""Meshes to volumes: what is enclosed is solid, whatever the mesh's inner surfaces and open shells. Meshing back lives in `extract`.

A mesh is first turned into oriented samples of its *outer* surface; volumes of any resolution and azimuth are read off those.
Axes: P samples, N cells, X Y Z grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import trimesh
from scipy import ndimage
from scipy.spatial import cKDTree

from ..errors import InputError
from .mesh import surface_colors
from .rasterize import EmbreeScene
from .volume import SparseVolume, cell_centers


FLOOD_RESOLUTION = 128  # cells of the grid on which "outside" is what a flood from the border reaches
NEIGHBORS = 4  # samples that vote on the side of a cell
MIN_HALF_THICKNESS = 0.6  # cells; a thinner plate falls through the grid


@dataclass
class SurfaceCloud:
    """Oriented samples of the outer surface of a mesh inside the sphere of radius 0.5.

    Args:
        points: `[P, 3]` float32.
        normals: `[P, 3]` float32 unit vectors pointing outside.
        colors: `[P, 3]` float32 sRGB in [0, 1].
        half_thickness: `[P]` float32, world units: 0 on a sheet (outside on both sides), half the thickness on a thin plate,
            infinite elsewhere. Volumes thicken what their cells could not hold.
        outside: `[X, Y, Z]` bool on the flood grid.
    """

    points: np.ndarray
    normals: np.ndarray
    colors: np.ndarray
    half_thickness: np.ndarray
    outside: np.ndarray

    @classmethod
    def from_mesh(cls, mesh: trimesh.Trimesh, samples: int = 120_000, seed: int = 0) -> SurfaceCloud:
        """Sample the surface that can be reached from outside.

        Args:
            mesh: A mesh inside the sphere of radius 0.5 (`normalize_to_sphere`).
            samples: Samples on the whole surface, inner parts included, before the inner ones are dropped.
            seed: Seed of the samples.
        """
        points, face_ids = trimesh.sample.sample_surface(mesh, samples, seed=seed)
        if np.abs(points).max() > 0.51:
            raise InputError("mesh: leaves the sphere of radius 0.5. Pass it through normalize_to_sphere first.")
        points = points.astype(np.float32)
        normals = np.asarray(mesh.face_normals, np.float32)[face_ids]
        surface = _mark(points)
        outside = _flood(surface)
        step = 2.0 / FLOOD_RESOLUTION
        front, back = _lookup(outside, points + step * normals), _lookup(outside, points - step * normals)
        near_outside = _lookup(ndimage.binary_dilation(outside, np.ones((3, 3, 3))), points)
        half_thickness = np.full(len(points), np.inf, np.float32)
        both = np.flatnonzero(front & back)
        half_thickness[both], flip = _resolve_thin(mesh, points[both], normals[both])
        normals[both[flip]] *= -1
        normals[back & ~front] *= -1
        keep = (front | back) & near_outside
        if not keep.any():
            raise InputError("mesh: no part of its surface can be reached from outside.")
        barycentrics = trimesh.triangles.points_to_barycentric(mesh.triangles[face_ids[keep]], points[keep])
        colors = surface_colors(mesh, face_ids[keep], np.nan_to_num(barycentrics, nan=1 / 3))
        return cls(points[keep], normals[keep], colors, half_thickness[keep], outside)

    def signed_distance(
        self,
        points: np.ndarray,  # [N, 3]
        min_half_thickness: float = 0.0,
        reach: float = math.inf,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Signed distance (negative inside) to the outer surface, and the index of the nearest sample, `[N]` each.

        Sheets and plates are thickened to `min_half_thickness` (world units) on both sides. Points farther than `reach` get an
        infinite distance of the right sign and any index.
        """
        # Points asked for in a row find the tree's nodes in the cache.
        order = np.lexsort(np.floor((points + 0.5) * 16).T)
        distances, nearest = np.empty((len(points), NEIGHBORS)), np.empty((len(points), NEIGHBORS), np.int64)
        distances[order], nearest[order] = self._tree.query(points[order], k=NEIGHBORS, distance_upper_bound=reach)
        nearest = np.minimum(nearest, len(self.points) - 1)  # none within reach is marked by one more than the last
        offsets = points[:, None] - self.points[nearest]  # [N, K, 3]
        heights = np.einsum("nki,nki->nk", offsets, self.normals[nearest])
        votes = (heights / np.maximum(distances, 1e-6)).sum(1)
        first, height = distances[:, 0], np.abs(heights[:, 0])
        spacing = math.sqrt(2.0 / len(self.points))
        lateral = np.sqrt(np.maximum(first**2 - height**2, 0))
        magnitude = np.where(lateral < 2 * spacing, height, first)  # between samples the surface is their plane
        # away from the surface the flood knows the side; close to it only the normals are finer than its cells
        is_outside = np.where(first > 2.5 / FLOOD_RESOLUTION, _lookup(self.outside, points), votes > 0)
        signed = np.where(is_outside, magnitude, -magnitude)
        half_thickness = self.half_thickness[nearest[:, 0]]
        signed = np.where(half_thickness == 0, first, signed) - np.maximum(min_half_thickness - half_thickness, 0)
        return signed.astype(np.float32), nearest[:, 0]

    def volume(self, resolution: int, truncation: float, azimuth: float = 0.0) -> SparseVolume:
        """The truncated signed distance and colour volume, as seen when the camera at `azimuth` is the front.

        Args:
            resolution: Cells along an edge.
            truncation: Cells with a smaller absolute distance are active (world units).
            azimuth: Degrees. The volume is that of the object turned by `-azimuth` about +Y.
        """
        turned = _rotation_y(azimuth)
        grid = np.zeros([resolution] * 3, bool)
        grid[tuple(_cells(self.points @ turned, resolution).T)] = True  # rows are R^T p
        thinnest = MIN_HALF_THICKNESS / resolution
        reach = truncation * resolution + 1.8 + MIN_HALF_THICKNESS  # cells
        coords = np.argwhere(ndimage.distance_transform_edt(~grid) <= reach)
        centers = cell_centers(torch.from_numpy(coords), resolution).numpy()
        sdf, nearest = self.signed_distance(centers @ turned.T, thinnest, truncation + thinnest)
        active = np.abs(sdf) < truncation
        return SparseVolume(
            torch.from_numpy(coords[active]),
            torch.from_numpy(sdf[active]),
            torch.from_numpy(self.colors[nearest[active]]),
            resolution,
            truncation,
        )

    def is_outside(
        self,
        points: np.ndarray,  # [N, 3]
    ) -> np.ndarray:
        """Whether a flood from outside reaches the points, `[N]` bool; exact only farther than a flood cell from the surface."""
        return _lookup(self.outside, points)

    @property
    def _tree(self) -> cKDTree:
        if not hasattr(self, "_cached_tree"):
            self._cached_tree = cKDTree(self.points, leafsize=32, balanced_tree=False, compact_nodes=False)
        return self._cached_tree


def _cells(points: np.ndarray, resolution: int) -> np.ndarray:
    return np.clip(np.floor((points + 0.5) * resolution), 0, resolution - 1).astype(np.int64)


def _mark(points: np.ndarray) -> np.ndarray:
    """Cells of the flood grid that the surface passes through."""
    surface = np.zeros([FLOOD_RESOLUTION] * 3, bool)
    surface[tuple(_cells(points, FLOOD_RESOLUTION).T)] = True
    return surface


def _flood(surface: np.ndarray) -> np.ndarray:
    """Cells off the surface that a flood from the border reaches; cracks of up to two cells are sealed first."""
    cube = np.ones((3, 3, 3), bool)
    sealed = np.pad(ndimage.binary_dilation(surface, cube), 2)
    labels, _ = ndimage.label(~sealed)
    reached = labels == labels[0, 0, 0]
    return ndimage.binary_dilation(reached, cube)[2:-2, 2:-2, 2:-2] & ~surface


def _lookup(grid: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values at points; beyond the grid everything is outside."""
    values = grid[tuple(_cells(points, len(grid)).T)]
    return values | (np.abs(points) > 0.5).any(1)


def _resolve_thin(mesh: trimesh.Trimesh, points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell thin plates from sheets among samples that see the outside on both sides.

    A plate has another surface just behind it; the mesh's own winding then says which side is out. A sheet has none.

    Returns:
        Half thickness `[P]` (0 for a sheet) and whether the normal must be turned `[P]`.
    """
    if len(points) == 0:
        return np.zeros(0, np.float32), np.zeros(0, bool)
    scene, reach, lift = EmbreeScene(mesh), 5.0 / FLOOD_RESOLUTION, 1e-4
    behind = scene.cast(points - lift * normals, -normals)[2]
    before = scene.cast(points + lift * normals, normals)[2]
    flip = (before < reach) & (behind >= reach)
    thickness = np.where(flip, before, behind)
    return np.where(thickness < reach, thickness / 2, 0).astype(np.float32), flip


def _rotation_y(degrees: float) -> np.ndarray:
    a = math.radians(degrees)
    return np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]], np.float32)
