"""Meshes that need no learning, to compare reports with: the visual hull of the views, the extruded silhouette of one image.

Nothing in the pipelines uses them. Axes: V views, H W pixels, X Y Z grid.
"""

from __future__ import annotations

import math

import mcubes
import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from ..errors import InputError
from ..geometry.cameras import CameraRig, project
from ..geometry.mesh import normalize_to_sphere
from ..geometry.rasterize import EmbreeScene
from ..geometry.volume import cell_centers


def visual_hull(
    masks: np.ndarray | Tensor,  # [V, H, W]
    rig: CameraRig | str,
    resolution: int = 64,
    images: np.ndarray | Tensor | None = None,  # [V, H, W, 3]
) -> trimesh.Trimesh:
    """What no silhouette rules out: the largest shape in the sphere of radius 0.5 that casts the given masks.

    Args:
        masks: Coverage in [0, 1] (or bool) of each view. Beyond an image's border nothing is known, so nothing is carved.
        rig: Their cameras.
        resolution: Cells along an edge of the cube of the world.
        images: sRGB pictures in [0, 1] for vertex colours, taken from the views that see a vertex, most from those that face it.

    Returns:
        Closed triangles in the world's frame, with vertex colours if there are `images`.

    Raises:
        InputError: If the shapes do not fit, or the masks leave nothing.
    """
    rig = CameraRig.of(rig)
    masks = torch.as_tensor(masks).float()
    if masks.ndim != 3 or len(masks) != len(rig):
        raise InputError(
            f"masks: got shape {tuple(masks.shape)}, expected [{len(rig)}, H, W], one for each camera of the rig."
        )
    centers = cell_centers(torch.cartesian_prod(*[torch.arange(resolution)] * 3), resolution)
    # the object lies in the sphere of radius 0.5: a ramp one cell wide, 0.5 on it
    field = ((0.5 - centers.norm(dim=-1)) * resolution + 0.5).clamp(0, 1)
    for view in range(len(rig)):  # one at a time: all views of a fine grid would not fit in memory
        uv, depth = project(centers, rig[view])
        inside = _sample(masks[view][None], uv[0], padding="border")[0]
        unseen = (uv[0].abs() > 1).any(-1) | (depth[0] <= 0)
        field = torch.minimum(field, torch.where(unseen, 1.0, inside))
    mesh = _mesh_of(
        field.reshape([resolution] * 3).numpy(),
        "masks: leave nothing of the object sphere. Check that they fit the rig.",
    )
    if images is not None:
        mesh.visual.vertex_colors = _colors_from_views(mesh, torch.as_tensor(images).float(), masks, rig)
    return mesh


def extruded_silhouette(
    image: np.ndarray,  # [H, W] or [H, W, 4]
    resolution: int = 64,
) -> trimesh.Trimesh:
    """The silhouette of one image given a depth: as deep as it is wide, front and back flat.

    Args:
        image: A mask in [0, 1] (or bool), or an RGBA picture (uint8, or floats in [0, 1]) whose colours are taken along.
        resolution: Cells along the longest side of the result.

    Returns:
        Closed triangles, the image facing +Z, in the sphere of radius 0.5, with vertex colours for an RGBA picture.

    Raises:
        InputError: If the shape is neither, or nothing is covered.
    """
    image = np.asarray(image)
    picture = torch.from_numpy(image / (255 if image.dtype == np.uint8 else 1)).float()
    if not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[-1] == 4)):
        raise InputError(f"image: got shape {image.shape}, expected [H, W] or [H, W, 4].")
    mask = picture if picture.ndim == 2 else picture[..., 3]
    rows, columns = (torch.nonzero((mask >= 0.5).any(axis))[:, 0] for axis in (1, 0))
    if len(rows) == 0:
        raise InputError("image: nothing in it is covered. Pass a mask or an image with an alpha channel.")
    height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
    # cube of the world to pixels: the silhouette's box is centred and its longest side fills the cube
    center = torch.tensor([columns[0] + columns[-1] + 1, rows[0] + rows[-1] + 1]) / 2
    pixels = torch.tensor([1.0, -1.0]) * max(height, width)
    size = torch.tensor([mask.shape[1], mask.shape[0]])

    def to_uv(xy: Tensor) -> Tensor:
        return (center + xy * pixels) / size * 2 - 1

    plane = cell_centers(torch.cartesian_prod(*[torch.arange(resolution)] * 2), resolution)
    front = _sample(mask[None], to_uv(plane)).reshape(resolution, resolution, 1)
    z = cell_centers(torch.arange(resolution), resolution)
    half_depth = width / max(height, width) / 2
    depth = ((half_depth - z.abs()) * resolution + 0.5).clamp(0, 1)  # a ramp one cell wide, 0.5 on the face
    mesh = _mesh_of(
        torch.minimum(front, depth).numpy(), "image: its silhouette is too thin for the resolution. Raise it."
    )
    if picture.ndim == 3:
        premultiplied = torch.cat([picture[..., :3] * mask[..., None], mask[..., None]], -1).permute(2, 0, 1)
        # vertices may lie a cell outside the mask, where there is no colour: mean over two cells
        reach = 2 * math.ceil(max(height, width) / resolution) + 1
        premultiplied = F.avg_pool2d(premultiplied, reach, stride=1, padding=reach // 2)
        color = _sample(premultiplied, to_uv(torch.from_numpy(np.asarray(mesh.vertices[:, :2])).float()))
        mesh.visual.vertex_colors = _rgba8((color[:3] / color[3:].clamp(min=1e-6)).T)
    return normalize_to_sphere(mesh)


def _sample(
    images: Tensor,  # [C, H, W]
    uv: Tensor,  # [P, 2]
    padding: str = "zeros",
) -> Tensor:
    """Bilinear values `[C, P]`."""
    return F.grid_sample(images[None], uv[None, None], padding_mode=padding, align_corners=False)[0, :, 0]


def _mesh_of(field: np.ndarray, empty: str) -> trimesh.Trimesh:
    """The 0.5 level of a field `[X, Y, Z]` on the world's cube, closed at its border."""
    vertices, faces = mcubes.marching_cubes(np.pad(field, 1), 0.5)
    if len(faces) == 0:
        raise InputError(empty)
    vertices = (vertices - 1 + 0.5) / len(field) - 0.5
    return trimesh.Trimesh(vertices, faces.astype(np.int64), process=False)


def _colors_from_views(mesh: trimesh.Trimesh, images: Tensor, masks: Tensor, rig: CameraRig) -> np.ndarray:
    """Mean colour `[P, 4]` of the views that see each vertex, weighted by how squarely they do; grey where none does."""
    vertices = torch.from_numpy(np.asarray(mesh.vertices)).float()
    normals = torch.from_numpy(np.array(mesh.vertex_normals)).float()
    scene, lift = EmbreeScene(mesh), 1e-3
    total, weights = torch.full((3, len(vertices)), 0.5e-4), torch.full((len(vertices),), 1e-4)
    uv = project(vertices, rig)[0]
    for view, toward in enumerate(rig.directions_to(vertices)):
        starts = vertices + lift * normals
        seen = torch.from_numpy(scene.cast(starts.numpy(), toward.numpy())[0] < 0)
        color = _sample(torch.cat([images[view].permute(2, 0, 1) * masks[view], masks[view][None]]), uv[view])
        weight = (toward * normals).sum(-1).clamp(min=0) ** 2 * seen
        total, weights = total + weight * color[:3], weights + weight * color[3]
    return _rgba8((total / weights).T)


def _rgba8(colors: Tensor) -> np.ndarray:
    rgb = (colors.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return np.concatenate([rgb, np.full_like(rgb[:, :1], 255)], 1)
