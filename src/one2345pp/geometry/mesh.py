"""Meshes: reading any file as one `trimesh.Trimesh`, normalising it, and the colour of points on it. Writing lives in `export`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh

from ..errors import InputError


def load_mesh(path: str | Path) -> trimesh.Trimesh:
    """Read a mesh file (GLB, OBJ, PLY, STL, ...) as one mesh, with its texture or vertex colours.

    Raises:
        InputError: If the file is missing, cannot be read, or holds no faces.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such mesh file.")
    try:
        scene = trimesh.load(path, force="scene", process=False)
        for one in scene.geometry.values():
            _restore_vertex_colors(one)
        mesh = scene.to_mesh()
    except Exception as error:  # trimesh raises whatever its many parsers raise
        raise InputError(f"{path}: cannot be read as a mesh ({error}). Pass GLB, OBJ, PLY or STL.") from error
    if not isinstance(mesh, trimesh.Trimesh) or len(mesh.faces) == 0:
        raise InputError(f"{path}: holds no faces.")
    if not np.isfinite(mesh.vertices).all():
        raise InputError(f"{path}: has vertices that are NaN or infinite.")
    return mesh


def normalize_to_sphere(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """A copy with the bounding box centred on the origin and the farthest vertex at distance 0.5."""
    used = np.unique(mesh.faces)
    vertices = np.asarray(mesh.vertices, dtype=np.float64)
    center = (vertices[used].min(0) + vertices[used].max(0)) / 2
    radius = np.linalg.norm(vertices[used] - center, axis=1).max()
    if not radius > 0:
        raise InputError("mesh: all vertices coincide, so it has no size.")
    out = mesh.copy()
    out.vertices = (vertices - center) * (0.5 / radius)
    return out


def surface_colors(
    mesh: trimesh.Trimesh,
    face_ids: np.ndarray,  # [P] integer
    barycentrics: np.ndarray,  # [P, 3]
) -> np.ndarray:
    """sRGB colour of points on the surface.

    Textures are sampled bilinearly and repeat outside [0, 1]; a mesh without texture gives its vertex or face colours, one without
    either gives grey.

    Returns:
        `[P, 3]` float32 in [0, 1].
    """
    faces = mesh.faces[face_ids]
    visual = mesh.visual
    if isinstance(visual, trimesh.visual.texture.TextureVisuals):
        image, factor = _base_color(visual.material)
        if image is not None and visual.uv is not None and len(visual.uv) == len(mesh.vertices):
            uv = np.einsum("pij,pi->pj", np.asarray(visual.uv, np.float32)[faces], barycentrics.astype(np.float32))
            return np.clip(_sample_repeat(image, uv) * factor, 0, 1)
        return np.broadcast_to(factor, (len(face_ids), 3)).astype(np.float32)
    if visual.kind == "face":
        return np.asarray(visual.face_colors)[face_ids, :3].astype(np.float32) / 255
    if visual.kind == "vertex":
        colors = np.asarray(visual.vertex_colors)[:, :3].astype(np.float32) / 255
        return np.einsum("pij,pi->pj", colors[faces], barycentrics.astype(np.float32))
    return np.full((len(face_ids), 3), 0.6, np.float32)


def _restore_vertex_colors(mesh: trimesh.Trimesh) -> None:
    """Give a mesh the vertex colours that its GLB had beside a material without a texture; trimesh sets them aside."""
    colors = getattr(mesh.visual, "vertex_attributes", {}).get("color")
    if colors is None or len(colors) != len(mesh.vertices):
        return
    image, factor = _base_color(mesh.visual.material)
    if image is None:
        colors = trimesh.visual.color.to_rgba(colors)
        colors[:, :3] = np.rint(colors[:, :3] * factor)
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colors)


def _base_color(material) -> tuple[np.ndarray | None, np.ndarray]:
    """Base colour image `[H, W, 3]` float32 in [0, 1] or None, and its factor `[3]`."""
    image = getattr(material, "baseColorTexture", None)
    factor = getattr(material, "baseColorFactor", None)
    if not hasattr(material, "baseColorTexture"):  # OBJ materials
        image, factor = (
            getattr(material, "image", None),
            None if getattr(material, "image", None) else material.main_color,
        )
    factor = np.ones(3, np.float32) if factor is None else np.asarray(factor, np.float32)[:3]
    factor = factor / 255 if factor.max() > 1 else factor
    if image is None:
        return None, factor
    return np.asarray(image.convert("RGB"), np.float32) / 255, factor


def _sample_repeat(image: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear lookup; `uv` has its origin at the lower left."""
    height, width = image.shape[:2]
    x = uv[:, 0] * width - 0.5
    y = (1 - uv[:, 1]) * height - 0.5
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    x0, y0 = x0.astype(np.int64) % width, y0.astype(np.int64) % height
    x1, y1 = (x0 + 1) % width, (y0 + 1) % height
    top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
    bottom = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
    return top * (1 - fy) + bottom * fy
