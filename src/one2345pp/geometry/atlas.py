"""Texture atlases: UVs for a mesh, the surface point each texel shows, seams. Who colours the texels lives elsewhere.

UVs have their origin at the lower left, images at the upper left. Axes: V vertices, F faces, P texels, H W image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import trimesh
import xatlas
from PIL import Image
from scipy import ndimage

from ..errors import InputError


CHART_FACES = 500  # xatlas takes time quadratic in the faces of a chart, so charts are kept to about this many
CHUNK = 1_000_000  # texels tested against faces at once


@dataclass
class Atlas:
    """A mesh cut along the borders of its charts.

    Args:
        vertices: `[V, 3]` float64; vertices on a cut are repeated.
        faces: `[F, 3]` int64, in the order and winding of the mesh's own faces.
        uvs: `[V, 2]` float64 in [0, 1].
        vertex_map: `[V]` int64, the mesh's vertex that each one stands for.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    vertex_map: np.ndarray

    def textured(self, image: Image.Image, roughness: float = 1.0) -> trimesh.Trimesh:
        """The mesh with `image` as its sRGB base colour, not metallic."""
        material = trimesh.visual.material.PBRMaterial(
            name="surface", baseColorTexture=image, metallicFactor=0.0, roughnessFactor=roughness
        )
        visual = trimesh.visual.TextureVisuals(uv=self.uvs, material=material)
        return trimesh.Trimesh(self.vertices, self.faces, visual=visual, process=False)


def unwrap(mesh: trimesh.Trimesh, texture_size: int = 1024, padding: int = 2) -> Atlas:
    """Cut a mesh into charts and pack them into the unit square; the same mesh gives the same UVs.

    Args:
        mesh: Triangles. Time grows with their number (about a second for 10,000): decimate dense meshes first.
        texture_size: Side in texels of the texture it is made for.
        padding: Texels kept free between charts.

    Raises:
        InputError: If no face has an area.
    """
    charts, packing = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_chart_area = float(mesh.area) * CHART_FACES / max(len(mesh.faces), CHART_FACES)
    packing.resolution = texture_size
    packing.padding = math.ceil(1.5 * padding)  # xatlas's square may come out larger than asked for
    packing.bilinear = True
    atlas = xatlas.Atlas()
    atlas.add_mesh(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.uint32))
    atlas.generate(charts, packing)
    if atlas.chart_count == 0:
        raise InputError("mesh: none of its faces has an area, so it cannot be given UVs.")
    vertex_map, faces, uvs = atlas[0]
    uvs = uvs * (np.array([atlas.width, atlas.height]) / max(atlas.width, atlas.height))  # texels stay square
    vertex_map = vertex_map.astype(np.int64)
    return Atlas(np.asarray(mesh.vertices)[vertex_map], faces.astype(np.int64), uvs.astype(np.float64), vertex_map)


def texel_samples(atlas: Atlas, texture_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The surface point that each texel of the atlas shows.

    Texels whose centre a face covers show the point under the centre; the ring of texels around them, which bilinear
    lookups near a chart's border also read, show the nearest point of the chart.

    Returns:
        Face ids `[P]`, barycentrics `[P, 3]` float32 (none negative) and flat texel indices `row * texture_size +
        column` `[P]`, ascending.
    """
    corners = atlas.uvs[atlas.faces]  # [F, 3, 2], to pixels with rows downwards, texel centres at integers
    corners = np.stack([corners[..., 0], 1 - corners[..., 1]], -1) * texture_size - 0.5
    owner = _covering_faces(corners, texture_size)
    distance, where = ndimage.distance_transform_edt(owner < 0, return_indices=True)
    rows, columns = np.nonzero(distance < 2)
    face_ids = owner[tuple(where[:, rows, columns])]
    barycentrics = _closest(corners[face_ids], np.stack([columns, rows], -1).astype(np.float64))
    return face_ids, barycentrics.astype(np.float32), rows * texture_size + columns


def pad_texture(texture: np.ndarray, mask: np.ndarray, iterations: int | None = None) -> np.ndarray:
    """Give texels outside `mask` the value of the nearest one inside it, so that seams do not bleed.

    Args:
        texture: `[H, W, C]`.
        mask: `[H, W]` bool.
        iterations: How many texels far; everywhere by default.
    """
    distance, where = ndimage.distance_transform_edt(~mask, return_indices=True)
    padded = texture[tuple(where)]
    return padded if iterations is None else np.where((distance <= iterations)[..., None], padded, texture)


def _covering_faces(
    corners: np.ndarray,  # [F, 3, 2] pixels
    texture_size: int,
) -> np.ndarray:
    """The face that covers each texel's centre or lies within it, `[H, W]` int64, -1 where there is none."""
    origin, edges = corners[:, 0], corners[:, 1:] - corners[:, :1]  # pixel = origin + (b1, b2) @ edges
    determinant = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    scale = 1 / np.where(determinant == 0, np.inf, determinant)
    to_b1 = np.stack([edges[:, 1, 1], -edges[:, 1, 0]], -1) * scale[:, None]
    to_b2 = np.stack([-edges[:, 0, 1], edges[:, 0, 0]], -1) * scale[:, None]
    low = np.ceil(corners.min(1)).astype(np.int64).clip(0, texture_size - 1)
    extent = np.maximum(np.floor(corners.max(1)).astype(np.int64).clip(0, texture_size - 1) - low + 1, 0)
    extent[determinant == 0] = 0
    owner = np.full(texture_size**2, -1, np.int64)
    counts = extent.prod(1)
    for faces in np.split(np.arange(len(corners)), np.flatnonzero(np.diff(np.cumsum(counts) // CHUNK)) + 1):
        face = np.repeat(faces, counts[faces])
        offset = np.arange(len(face)) - np.repeat(np.cumsum(counts[faces]) - counts[faces], counts[faces])
        row, column = np.divmod(offset, extent[face, 0])
        x, y = low[face, 0] + column, low[face, 1] + row
        dx, dy = x - origin[face, 0], y - origin[face, 1]
        b1 = to_b1[face, 0] * dx + to_b1[face, 1] * dy
        b2 = to_b2[face, 0] * dx + to_b2[face, 1] * dy
        inside = (b1 >= -1e-9) & (b2 >= -1e-9) & (b1 + b2 <= 1 + 1e-9)
        owner[(y * texture_size + x)[inside]] = face[inside]
    slivers = np.setdiff1d(np.arange(len(corners)), owner)  # faces between the centres get what free texels they pass
    spots = np.concatenate([corners, (corners + np.roll(corners, 1, axis=1)) / 2], 1)[slivers]
    columns, rows = np.rint(spots).astype(np.int64).clip(0, texture_size - 1).reshape(-1, 2).T
    texels, slivers = rows * texture_size + columns, np.repeat(slivers, 6)
    free = owner[texels] < 0
    owner[texels[free]] = slivers[free]
    return owner.reshape(texture_size, texture_size)


def _closest(
    triangles: np.ndarray,  # [P, 3, 2]
    points: np.ndarray,  # [P, 2]
) -> np.ndarray:
    """Barycentrics `[P, 3]` of the point of each triangle closest to each point."""
    edges = np.roll(triangles, -1, axis=1) - triangles  # [P, 3, 2] from corner i to i + 1
    offsets = points[:, None] - triangles
    areas = edges[..., 0] * offsets[..., 1] - edges[..., 1] * offsets[..., 0]  # twice that of the point with each edge
    total = areas.sum(1, keepdims=True)
    barycentrics = np.roll(areas, -1, axis=1) / np.where(total == 0, 1, total)  # corner i is across from edge i + 1
    out = np.flatnonzero((barycentrics < 0).any(1))
    edges, offsets = edges[out], offsets[out]
    along = ((edges * offsets).sum(-1) / np.maximum((edges**2).sum(-1), 1e-12)).clip(0, 1)
    nearest = np.linalg.norm(offsets - along[..., None] * edges, axis=-1).argmin(1)
    weight = along[np.arange(len(out)), nearest]
    barycentrics[out] = 0
    barycentrics[out, nearest] = 1 - weight
    barycentrics[out, (nearest + 1) % 3] = weight
    return barycentrics
