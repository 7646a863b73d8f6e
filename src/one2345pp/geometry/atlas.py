"""Texture atlases: UVs for a mesh, which surface point each texel shows, seams. What colour a texel gets is decided elsewhere.

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
CHUNK = 2_000_000  # candidate texels looked at at once


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


def texel_samples(
    atlas: Atlas, texture_size: int, reach: float = 0.75
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The surface point that each texel of the atlas shows.

    Args:
        atlas: UVs.
        texture_size: Side of the texture.
        reach: Texels whose centre lies outside every chart by less than this many texels show the nearest point of a face.

    Returns:
        Face ids `[P]`, barycentrics `[P, 3]` float32 (none negative) and flat texel indices `row * texture_size + column` `[P]`,
        ascending.
    """
    corners = atlas.uvs[atlas.faces]  # [F, 3, 2], to pixels with rows downwards, texel centres at integers
    corners = np.stack([corners[..., 0], 1 - corners[..., 1]], -1) * texture_size - 0.5
    low = np.ceil(corners.min(1) - reach).astype(np.int64).clip(0, texture_size - 1)
    high = np.floor(corners.max(1) + reach).astype(np.int64).clip(0, texture_size - 1)
    extent = np.maximum(high - low + 1, 0)  # [F, 2] columns, rows
    ends = np.cumsum(extent.prod(1))
    pieces, start = [], 0
    while start < len(ends):
        done = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, done + CHUNK, side="right")), start + 1)
        pieces.append(_candidates(corners, low, extent, np.arange(start, stop), texture_size, reach))
        start = stop
    face_ids, barycentrics, texels, distance = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.lexsort((face_ids, distance, texels))  # the nearest face has each texel
    first = order[np.flatnonzero(np.diff(texels[order], prepend=-1))]
    return face_ids[first], barycentrics[first].astype(np.float32), texels[first]


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


def _candidates(
    corners: np.ndarray,  # [F, 3, 2] pixels
    low: np.ndarray,  # [F, 2]
    extent: np.ndarray,  # [F, 2]
    faces: np.ndarray,  # [f] some of the faces
    texture_size: int,
    reach: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Face, barycentrics, texel and distance in texels, for every texel within `reach` of each face."""
    counts = extent[faces].prod(1)
    face_ids = np.repeat(faces, counts)
    offset = np.arange(len(face_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = np.maximum(extent[face_ids, 0], 1)
    pixels = low[face_ids] + np.stack([offset % columns, offset // columns], -1)
    barycentrics, distance = _closest(corners[face_ids], pixels.astype(np.float64))
    keep = distance <= reach
    texels = pixels[:, 1] * texture_size + pixels[:, 0]
    return face_ids[keep], barycentrics[keep], texels[keep], distance[keep]


def _closest(
    triangles: np.ndarray,  # [P, 3, 2]
    points: np.ndarray,  # [P, 2]
) -> tuple[np.ndarray, np.ndarray]:
    """Barycentrics `[P, 3]` of the point of each triangle closest to each point, and its distance `[P]`, 0 inside."""
    edges = np.roll(triangles, -1, axis=1) - triangles  # [P, 3, 2] from corner i to i + 1
    offsets = points[:, None] - triangles
    areas = edges[..., 0] * offsets[..., 1] - edges[..., 1] * offsets[..., 0]  # twice that of the point with each edge
    total = areas.sum(1, keepdims=True)
    inside = (areas * np.sign(total) >= 0).all(1) & (np.abs(total[:, 0]) > 1e-12)
    barycentrics = np.roll(areas, -1, axis=1) / np.where(inside[:, None], total, 1)  # corner i is across from edge i + 1
    along = (edges * offsets).sum(-1) / np.maximum((edges**2).sum(-1), 1e-12)
    along = along.clip(0, 1)
    gap = np.linalg.norm(offsets - along[..., None] * edges, axis=-1)  # [P, 3]
    nearest, rows = gap.argmin(1), np.arange(len(points))
    on_edge = np.zeros((len(points), 3))
    on_edge[rows, nearest] = 1 - along[rows, nearest]
    on_edge[rows, (nearest + 1) % 3] = along[rows, nearest]
    return np.where(inside[:, None], barycentrics, on_edge), np.where(inside, 0, gap[rows, nearest])
