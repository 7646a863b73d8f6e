"""Texture atlases: UVs for a mesh, the surface point each texel shows, seams. Who colours the texels lives elsewhere.

UVs have their origin at the lower left, images at the upper left. Axes: V vertices, F faces, P texels, H W image.
"""

from __future__ import annotations

import io
import logging
import math
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from scipy import ndimage

from ..errors import InputError
from .box_charts import project_charts
from .texels import CHUNK, covered_texels


logger = logging.getLogger(__name__)

CHART_FACES = 500  # xatlas takes time quadratic in the faces of a chart, so charts are kept to about this many
XATLAS_FACES = 50_000  # half a minute's work


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


def unwrap(mesh: trimesh.Trimesh, texture_size: int = 1024, padding: int = 2, time_limit: float = 120.0) -> Atlas:
    """Cut a mesh into charts and pack them into the unit square; the same mesh gives the same UVs.

    The charts are xatlas's. If the mesh is too large for it, or it is not done in time, they are box projections
    (`projection.project_charts`), which take a few seconds for any mesh, and the log says so.

    Args:
        mesh: Triangles.
        texture_size: Side in texels of the texture it is made for.
        padding: Texels kept free between charts.
        time_limit: Seconds given to xatlas; 0 goes without it.

    Raises:
        InputError: If no face has an area.
    """
    if not mesh.area > 0:
        raise InputError("mesh: none of its faces has an area, so it cannot be given UVs.")
    vertices, cut = np.asarray(mesh.vertices), None
    if len(mesh.faces) <= XATLAS_FACES and time_limit > 0:
        cut = _xatlas_charts(mesh, texture_size, padding, time_limit)
    elif time_limit > 0:
        logger.warning("unwrap: %d faces are too many for xatlas, so charts are box projections.", len(mesh.faces))
    if cut is None:
        cut = project_charts(vertices, np.asarray(mesh.faces), texture_size, padding)
    vertex_map, faces, uvs = cut
    return Atlas(vertices[vertex_map], faces.astype(np.int64), uvs.astype(np.float64), vertex_map.astype(np.int64))


def _xatlas_charts(
    mesh: trimesh.Trimesh, texture_size: int, padding: int, time_limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Vertex map, faces and UVs as `projection.project_charts`, or `None`, with a warning, if xatlas does not give them."""
    given = io.BytesIO()
    np.savez(
        given,
        vertices=np.asarray(mesh.vertices, np.float32),
        faces=np.asarray(mesh.faces, np.uint32),
        max_chart_area=float(mesh.area) * CHART_FACES / max(len(mesh.faces), CHART_FACES),
        resolution=texture_size,
        padding=math.ceil(1.5 * padding),  # xatlas's square may come out larger than asked for
        time_limit=time_limit,
    )
    # where Python is embedded, sys.executable is another program, or nothing
    command = [sys.executable or "python3", str(Path(__file__).with_name("xatlas_child.py"))]
    try:
        done = subprocess.run(command, input=given.getvalue(), capture_output=True, timeout=time_limit, check=True)
        found = np.load(io.BytesIO(done.stdout))
    except (subprocess.SubprocessError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        late = isinstance(error, subprocess.TimeoutExpired)
        reason = f"was not done in {time_limit:g} s" if late else f"failed ({error})"
        logger.warning("unwrap: xatlas %s, so charts are box projections.", reason)
        return None
    width, height = found["size"]
    uvs = found["uvs"] * (np.array([width, height]) / max(width, height, 1))  # texels stay square
    if not np.isfinite(uvs).all():
        logger.warning("unwrap: xatlas found no places for some faces, so charts are box projections.")
        return None
    return found["vertex_map"], found["faces"], uvs


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
    barycentrics = np.empty((len(face_ids), 3), np.float32)
    for first in range(0, len(face_ids), CHUNK):
        piece = slice(first, first + CHUNK)
        texels = np.stack([columns[piece], rows[piece]], -1).astype(np.float64)
        barycentrics[piece] = _closest(corners[face_ids[piece]], texels)
    return face_ids, barycentrics, rows * texture_size + columns


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
    owner = np.full(texture_size**2, -1, np.int64)
    for texel, face, nearest in covered_texels(corners, texture_size):
        inside = nearest >= -1e-9
        owner[texel[inside]] = face[inside]
    # Faces between the centres, and sharp corners, get what free texels they pass.
    spots = np.concatenate([corners, (corners + np.roll(corners, 1, axis=1)) / 2], 1)
    columns, rows = np.rint(spots).astype(np.int64).clip(0, texture_size - 1).reshape(-1, 2).T
    texels, faces = rows * texture_size + columns, np.repeat(np.arange(len(corners)), 6)
    free = owner[texels] < 0
    owner[texels[free]] = faces[free]
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
