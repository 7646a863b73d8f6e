"""Volumes to meshes: unknown cells, marching cubes, colours, floaters, decimation. UVs live in `atlas`.

Nothing here assumes one component, a closed shell of active cells or a filled inside.
Axes: V vertices, F faces, P points, N cells, X Y Z grid.
"""

from __future__ import annotations

import fast_simplification
import mcubes
import numpy as np
import trimesh
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from ..errors import InputError
from .harmonic import harmonic_extension
from .mesh import surface_colors
from .volume import SparseVolume


def volume_to_mesh(volume: SparseVolume, min_component: float = 0.01) -> trimesh.Trimesh:
    """The zero level of a volume as a coloured mesh; what is enclosed is solid, and gaps between active cells are closed.

    Args:
        volume: Signed distance and colour on active cells; all other cells are inferred (`solid_sdf`).
        min_component: Components with a smaller share of the largest one's area are dropped as floaters.

    Returns:
        Closed, outward-wound triangles with vertex colours, in the world's frame.

    Raises:
        InputError: If the volume is empty, holds values that are not finite, or has no surface.
    """
    if len(volume) == 0:
        raise InputError("volume: has no active cells, so no surface. Try another seed or check the image's cut-out.")
    if not (volume.sdf.isfinite().all() and volume.colors.isfinite().all()):
        raise InputError("volume: contains NaN or infinity. Run the model in float32, or try another seed.")
    grid = solid_sdf(volume)
    if not (grid < 0).any():
        raise InputError(
            f"volume: none of its {len(volume)} active cells is inside the object, so there is no surface. "
            "Try another seed, more steps, or check the image's cut-out."
        )
    closed = np.pad(grid, 1, constant_values=volume.truncation)  # meshes close at the border of the cube
    vertices, faces = mcubes.marching_cubes(closed, 0.0)
    vertices = (vertices - 1 + 0.5) / volume.resolution - 0.5
    faces = faces[:, ::-1].astype(np.int64)  # PyMCubes winds towards the negative side
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    mesh.visual.vertex_colors = to_rgba8(_volume_colors(volume, vertices))
    return keep_components(mesh, min_component)


def solid_sdf(volume: SparseVolume) -> np.ndarray:
    """Signed distance on the whole grid, `[X, Y, Z]` float64, never within a thousandth of the truncation of zero.

    Cells that are not active take the harmonic extension of those that are, so neither a closed band nor one component
    is assumed: leaks are spanned by a membrane. Outsides that the grid's border cannot reach are then filled.
    """
    known, values = np.zeros([volume.resolution] * 3, bool), np.zeros([volume.resolution] * 3)
    cells = tuple(volume.coords.cpu().numpy().T)
    known[cells] = True
    values[cells] = volume.sdf.cpu().double().numpy().clip(-volume.truncation, volume.truncation)
    grid = np.where(known, values, harmonic_extension(values, known, volume.truncation))
    outside = grid >= 0
    labels, _ = ndimage.label(outside)
    border = np.concatenate([side.ravel() for axis in range(3) for side in np.moveaxis(labels, axis, 0)[[0, -1]]])
    grid[outside & ~np.isin(labels, border)] = -volume.truncation
    floor = 1e-3 * volume.truncation  # exact zeros would make faces without area
    return np.where(grid < 0, np.minimum(grid, -floor), np.maximum(grid, floor))


def keep_components(mesh: trimesh.Trimesh, min_share: float = 0.01) -> trimesh.Trimesh:
    """The mesh without floaters (area below `min_share` of the largest component's) and inside-out (inner) shells."""
    faces = mesh.faces
    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    graph = coo_matrix((np.ones(len(edges), bool), edges.T), shape=[len(mesh.vertices)] * 2)
    count, labels = connected_components(graph, directed=False)
    labels = labels[faces[:, 0]]
    area = np.bincount(labels, mesh.area_faces, minlength=count)
    triangles = mesh.triangles
    volumes = np.einsum("fi,fi->f", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])) / 6
    keep = (area >= min_share * area.max()) & (np.bincount(labels, volumes, minlength=count) >= 0)
    if not keep.any():
        raise InputError("mesh: every component is inside out, so nothing would be left. Flip the faces' winding.")
    return _compact(mesh, keep[labels])


def decimate(mesh: trimesh.Trimesh, faces: int) -> trimesh.Trimesh:
    """At most `faces` faces by quadric edge collapse; vertex colours are carried over from the original surface.

    A mesh within the budget is returned as it is.

    Raises:
        InputError: If the mesh is in too many pieces to be brought under the budget.
    """
    if faces < 4:
        raise InputError(f"faces: got {faces}, expected at least 4.")
    if len(mesh.faces) <= faces:
        return mesh
    points, inverse = np.unique(np.asarray(mesh.vertices), axis=0, return_inverse=True)  # files often split vertices
    welded = inverse.reshape(-1)[mesh.faces]
    vertices, triangles = points, welded[_distinct(welded)]
    for aggressiveness in (5.0, 7.0, 10.0, 20.0):  # gentle first; each round goes on from the one before
        if len(triangles) > faces:
            vertices, triangles = fast_simplification.simplify(
                vertices, triangles.astype(np.int64), target_count=faces, agg=aggressiveness
            )
            triangles = triangles[_distinct(triangles) & np.isfinite(vertices[triangles]).all((1, 2))]
    if not 0 < len(triangles) <= faces:
        raise InputError(
            f"mesh: its {len(mesh.faces)} faces cannot be simplified to {faces}, only to {len(triangles)}: "
            "it is in too many pieces. Allow more faces, or remove small parts."
        )
    out = trimesh.Trimesh(vertices, triangles, process=False)
    out = _compact(out, out.nondegenerate_faces())
    out.visual.vertex_colors = to_rgba8(_nearest_colors(mesh, out.vertices))
    return out


# --- colours ----------------------------------------------------------------------------------------------------


def _volume_colors(volume: SparseVolume, points: np.ndarray) -> np.ndarray:
    """Trilinear over the active cells around each point, the nearest active cell where there are none; `[P, 3]`."""
    colors, coords = volume.colors.cpu().double().numpy(), volume.coords.cpu().numpy()
    index = np.full([volume.resolution + 2] * 3, -1)
    index[tuple(coords.T + 1)] = np.arange(len(volume))
    position = (points + 0.5) * volume.resolution - 0.5
    low = np.floor(position).astype(np.int64)
    total, weight_sum = np.zeros((len(points), 3)), np.zeros(len(points))
    for corner in np.ndindex(2, 2, 2):
        cell = index[tuple((low + corner + 1).T)]
        weight = np.where(corner, position - low, 1 - (position - low)).prod(1) * (cell >= 0)
        total += weight[:, None] * colors[cell]
        weight_sum += weight
    unknown = weight_sum < 1e-6
    total[unknown] = colors[cKDTree(coords).query(position[unknown])[1]]
    return total / np.where(unknown, 1, weight_sum)[:, None]


def _nearest_colors(mesh: trimesh.Trimesh, points: np.ndarray, neighbors: int = 4) -> np.ndarray:
    """Colours of a mesh's surface near points, by inverse distance over its vertices and face centres; `[P, 3]`."""
    used, corner = np.unique(mesh.faces.ravel(), return_index=True)
    face_ids = np.concatenate([corner // 3, np.arange(len(mesh.faces))])
    barycentrics = np.concatenate([np.eye(3)[corner % 3], np.full((len(mesh.faces), 3), 1 / 3)])
    cloud = np.concatenate([mesh.vertices[used], mesh.triangles_center])
    distance, index = cKDTree(cloud).query(points, k=neighbors)
    weight = 1 / np.maximum(distance, 1e-9)
    colors = surface_colors(mesh, face_ids, barycentrics)[index]
    return np.einsum("pk,pki->pi", weight / weight.sum(1, keepdims=True), colors)


def to_rgba8(colors: np.ndarray) -> np.ndarray:
    rgb = np.rint(np.clip(colors, 0, 1) * 255).astype(np.uint8)
    return np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], 1)


# --- faces ------------------------------------------------------------------------------------------------------


def _distinct(faces: np.ndarray) -> np.ndarray:
    """`[F]` bool: faces whose three vertices differ."""
    return (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])


def _compact(mesh: trimesh.Trimesh, keep: np.ndarray) -> trimesh.Trimesh:
    """The kept faces and the vertices they use, with their colours."""
    used, faces = np.unique(mesh.faces[keep], return_inverse=True)
    out = trimesh.Trimesh(mesh.vertices[used], faces.reshape(-1, 3), process=False)
    if mesh.visual.kind == "vertex":
        out.visual.vertex_colors = np.asarray(mesh.visual.vertex_colors)[used]
    return out
