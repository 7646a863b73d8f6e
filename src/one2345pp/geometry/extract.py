"""Volumes to meshes: signs of unknown cells, marching cubes, colours, floaters, decimation. UVs live in `atlas`.

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
from .mesh import surface_colors
from .volume import SparseVolume


SEAL_RADII = (0, 1, 2, 4)  # cells by which the band is thickened to find insides that leak through holes in it


def volume_to_mesh(volume: SparseVolume, min_component: float = 0.01) -> trimesh.Trimesh:
    """The zero level of a volume as a coloured mesh; what is enclosed is solid.

    Args:
        volume: Signed distance and colour on active cells; the sign of all other cells is inferred (`solid_sdf`).
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
    grid, nearest = solid_sdf(volume)
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
    mesh.visual.vertex_colors = _to_rgba8(_volume_colors(volume, nearest, vertices))
    return keep_components(mesh, min_component)


def solid_sdf(volume: SparseVolume) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance on the whole grid, with `+-truncation` on cells that are not active.

    Connected regions of inactive cells take the sign that the active cells around them vote for, weighted by distance;
    those that reach the grid's border are outside unless the vote is all but unanimous (an object cut off by the cube).
    Insides that leak out through holes in the band are found by thickening the band. Enclosed outsides are then filled.

    Returns:
        `[X, Y, Z]` float64, never within a thousandth of the truncation of zero, and for each grid cell which of the
        volume's cells is nearest, `[X, Y, Z]`.
    """
    index = np.full([volume.resolution] * 3, -1, np.int64)
    index[tuple(volume.coords.cpu().numpy().T)] = np.arange(len(volume))
    active = index >= 0
    distance, where = ndimage.distance_transform_edt(~active, return_indices=True)
    nearest = index[tuple(where)]
    sdf = volume.sdf.cpu().double().numpy().clip(-volume.truncation, volume.truncation)[nearest]
    inside = _unknown_inside(distance, sdf)
    grid = np.where(active, sdf, np.where(inside, -volume.truncation, volume.truncation))
    outside = grid >= 0
    labels, _ = ndimage.label(outside)
    grid[outside & ~np.isin(labels, _border(labels))] = -volume.truncation
    floor = 1e-3 * volume.truncation  # exact zeros would make faces without area
    return np.where(grid < 0, np.minimum(grid, -floor), np.maximum(grid, floor)), nearest


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
    out.visual.vertex_colors = _to_rgba8(_nearest_colors(mesh, out.vertices))
    return out


# --- signs ------------------------------------------------------------------------------------------------------


def _unknown_inside(
    distance: np.ndarray,  # [X, Y, Z] to the nearest active cell, in cells
    sdf: np.ndarray,  # [X, Y, Z] of the nearest active cell
) -> np.ndarray:
    """`[X, Y, Z]` bool: inactive cells that are inside the object."""
    inside, outside = np.zeros(distance.shape, bool), distance > 0
    for radius in SEAL_RADII:
        core = (distance > radius) & outside
        found = _vote(core, core & (distance <= radius + 1), sdf)
        if radius and found.any():
            # the rim between the band and the thickened band goes to the nearer of inside and outside
            where = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
            found |= outside & ~core & found[tuple(where)]
        inside |= found
        outside &= ~found
    return inside


def _vote(region: np.ndarray, voters: np.ndarray, sdf: np.ndarray) -> np.ndarray:
    """`[X, Y, Z]` bool: the connected parts of `region` whose `voters` say inside."""
    labels, count = ndimage.label(region)
    votes = np.bincount(labels[voters], sdf[voters], minlength=count + 1).astype(float)  # integers where none votes
    votes /= np.maximum(np.bincount(labels[voters], np.abs(sdf[voters]), minlength=count + 1), 1e-12)
    border = _border(labels)
    share = np.bincount(border, minlength=count + 1) / len(border)
    limit = np.where(share > 0, -0.9, 0.0)
    limit[share > 0.5] = -np.inf  # whatever the votes, most of the border is not inside
    inside = votes < limit
    inside[0] = False  # label 0 is no region
    return inside[labels]


def _border(labels: np.ndarray) -> np.ndarray:
    """Values of the cells on the six faces of the grid."""
    return np.concatenate([face.ravel() for axis in range(3) for face in np.moveaxis(labels, axis, 0)[[0, -1]]])


# --- colours ----------------------------------------------------------------------------------------------------


def _volume_colors(volume: SparseVolume, nearest: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Trilinear over the active cells around each point, the nearest active cell where there are none; `[P, 3]`."""
    colors = volume.colors.cpu().double().numpy()
    coords = volume.coords.cpu().numpy()
    position = (points + 0.5) * volume.resolution - 0.5
    low = np.floor(position).astype(np.int64)
    fraction = position - low
    total, weight_sum = np.zeros((len(points), 3)), np.zeros(len(points))
    for corner in np.ndindex(2, 2, 2):
        cell = low + corner
        valid = ((cell >= 0) & (cell < volume.resolution)).all(1)
        owner = nearest[tuple(np.where(valid[:, None], cell, 0).T)]
        valid &= (coords[owner] == cell).all(1)  # a cell that is its own nearest active cell is active
        weight = np.where(corner, fraction, 1 - fraction).prod(1) * valid
        total += weight[:, None] * colors[owner]
        weight_sum += weight
    fallback = colors[nearest[tuple(np.rint(position).astype(np.int64).clip(0, volume.resolution - 1).T)]]
    known = weight_sum > 1e-6
    return np.where(known[:, None], total / np.maximum(weight_sum, 1e-6)[:, None], fallback)


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


def _to_rgba8(colors: np.ndarray) -> np.ndarray:
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
