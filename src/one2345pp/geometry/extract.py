"""Volumes to meshes: unknown cells, marching cubes, colours; and any mesh to a solid. Care of meshes lives in `repair`.

Nothing here assumes one component, a closed shell of active cells or a filled inside.
Axes: P points, X Y Z grid.
"""

from __future__ import annotations

import mcubes
import numpy as np
import trimesh
from scipy import ndimage
from scipy.spatial import cKDTree

from ..errors import InputError
from .harmonic import harmonic_extension
from .mesh import normalize_to_sphere
from .repair import decimate, is_solid, keep_components, pull_apart, repair_mesh, report_loss, to_rgba8
from .volume import SparseVolume
from .voxelize import SurfaceCloud


__all__ = ["decimate", "finish_mesh", "keep_components", "solid_sdf", "solidify", "volume_to_mesh"]


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
    is assumed: leaks are spanned by a membrane, though a gap through a wall thinner than the gap is wide may stay.
    Outsides that the grid's border cannot reach are then filled.
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


def solidify(mesh: trimesh.Trimesh, resolution: int = 128) -> trimesh.Trimesh:
    """A closed, outward-wound solid for printing: the repaired mesh if it is one, else one rebuilt from its outer surface.

    It has no inner shells. What is rebuilt has vertex colours and details down to `1 / resolution` of the object.
    """
    whole = pull_apart(repair_mesh(mesh))
    if is_solid(whole):
        return report_loss("solidify", mesh, keep_components(whole, min_share=0))
    used = np.unique(whole.faces)
    unit = normalize_to_sphere(whole)
    low, high = whole.vertices[used].min(0), whole.vertices[used].max(0)
    scale = np.linalg.norm(high - low) / max(np.linalg.norm(np.ptp(unit.vertices[used], axis=0)), 1e-30)
    out = pull_apart(volume_to_mesh(SurfaceCloud.from_mesh(unit).volume(resolution, 3.2 / resolution)))
    out.vertices = out.vertices * scale + (low + high) / 2
    return report_loss("solidify", mesh, out)


def finish_mesh(mesh: trimesh.Trimesh, max_faces: int | None = None, watertight: bool = False) -> trimesh.Trimesh:
    """The mesh as it was asked for: closed, then within its face budget. Asked for neither, it is returned as it is.

    Args:
        mesh: Triangles of any kind.
        max_faces: See `decimate`.
        watertight: Make it a solid for printing (`solidify`), which it stays within the budget.

    Raises:
        InputError: If the budget cannot be met, or not without opening the solid.
    """
    mesh = solidify(mesh) if watertight else mesh
    out = mesh if max_faces is None else decimate(mesh, max_faces)
    if watertight and not is_solid(out):
        within = "" if max_faces is None else f" within {max_faces} faces"
        raise InputError(f"mesh: cannot be made watertight{within}. Allow more faces, or do without watertight.")
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
