"""Pictures of meshes: views, sheets of them, turntables; shaded, or of normals, edges or depths. `rasterize` rasterises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image

from ..errors import InputError
from ..names import SHADINGS
from .cameras import CameraRig, project
from .mesh import surface_colors
from .rasterize import Fragments, rasterize


MAPS = ("depth",)  # for networks rather than eyes

# Direction to the key light in the camera's frame (over the left shoulder), and how much of the colour it decides.
KEY_LIGHT = np.array([-0.35, 0.55, 0.75], np.float32) / np.linalg.norm([-0.35, 0.55, 0.75])
AMBIENT, DIFFUSE = 0.72, 0.36

CLAY, INK = 0.85, 0.8  # grey of a wireframe's surface, and how much darker its lines are
LINE = 0.5  # pixels from an edge to the border of its line


def render(
    mesh: trimesh.Trimesh,
    rig: CameraRig,
    size: int,
    supersample: int = 2,
    shading: str = "soft",
    rasterizer: str = "auto",
    light: np.ndarray | None = None,  # [3] in the world
) -> np.ndarray:
    """Draw the textured mesh from every camera on a transparent background.

    Args:
        mesh: Mesh with a texture, vertex colours or none.
        rig: `V` cameras.
        size: Height and width of the pictures in pixels.
        supersample: Rays along each side of a pixel.
        shading: `"soft"` (headlight, both sides of a face lit), `"none"` (flat colours), `"normal"` (camera-space normals),
            `"wireframe"` (edges of the faces in sight on grey; fainter where faces are smaller than a line) or `"depth"` (along the
            optical axis: half grey is as far as the origin, white the nearest side of the object sphere, black its farthest).
        rasterizer: As `rasterize`.
        light: Direction to a light fixed in the world, for `"soft"`; the default light moves with the camera.

    Returns:
        `[V, size, size, 4]` uint8, straight alpha, sRGB. Colours of half-covered pixels are those of the covered part.

    Raises:
        InputError: If there is no such shading or rasteriser.
    """
    if shading not in SHADINGS + MAPS:
        raise InputError(f"shading: got {shading!r}, expected {', '.join(map(repr, SHADINGS + MAPS))}.")
    fine, rig = size * supersample, rig.to("cpu")
    out = np.zeros((len(rig), size, size, 4), np.uint8)
    for view in range(len(rig)):
        fragments = rasterize(mesh, rig[view], fine, rasterizer=rasterizer)
        colors = _shaded(mesh, rig[view], fragments, shading, light, LINE * supersample)
        picture = np.zeros((fine, fine, 4), np.float32)
        picture[fragments.mask[0]] = np.concatenate([np.clip(colors, 0, 1), np.ones((len(colors), 1), np.float32)], 1)
        picture = picture.reshape(size, supersample, size, supersample, 4).mean((1, 3))
        picture[..., :3] /= np.maximum(picture[..., 3:], 1e-6)
        out[view] = np.round(picture * 255).astype(np.uint8)
    return out


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | np.ndarray]],
    size: int | None = None,
    background=(255, 255, 255),
    gap: int = 4,
) -> Image.Image:
    """Pictures in rows on one sheet, each resized to `size` (default: the first picture's) and laid on `background`."""
    rows = [[Image.fromarray(p) if isinstance(p, np.ndarray) else p for p in row] for row in rows]
    size = size or rows[0][0].width
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, len(rows) * (size + gap) + gap), background)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            height = round(size * picture.height / picture.width)
            picture = picture.convert("RGBA").resize((size, height), Image.Resampling.LANCZOS)
            picture = picture.crop((0, 0, size, size)) if height > size else picture
            sheet.paste(picture, (gap + j * (size + gap), gap + i * (size + gap)), picture)
    return sheet


def orbit(views: int, elevation: float = 15.0, fov: float = math.radians(30), margin: float = 1.1) -> CameraRig:
    """A ring of cameras that sees the whole object sphere, starting at the front."""
    azimuths = torch.arange(views) * (360 / views)
    return CameraRig.from_angles(azimuths, elevation, fov, margin * 0.5 / math.sin(fov / 2))


def turntable(
    mesh: trimesh.Trimesh,
    path: str | Path,
    frames: int = 36,
    size: int = 256,
    fps: int = 18,
    shadings: Sequence[str] = ("soft",),
) -> None:
    """Write a turning view of the mesh as `.gif`, or as `.mp4` (needs the `[video]` extra); several shadings lie side by side.

    Raises:
        InputError: If the suffix is another one, or `.mp4` cannot be written here.
    """
    path = Path(path)
    pictures = []
    for view in np.concatenate([render(mesh, orbit(frames), size, shading=shading) for shading in shadings], 2):
        alpha = view[..., 3:].astype(np.float32) / 255
        pictures.append(np.round(view[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))
    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix.lower() == ".gif":
        first, *rest = (Image.fromarray(p).quantize(128) for p in pictures)
        first.save(partial, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    elif path.suffix.lower() == ".mp4":
        try:
            import imageio_ffmpeg
        except ImportError:
            raise InputError(
                f"{path}: MP4 needs the video extra: pip install 'one2345pp[video]', or ask for .gif."
            ) from None
        writer = imageio_ffmpeg.write_frames(str(partial), (len(shadings) * size, size), fps=fps)
        writer.send(None)
        for picture in pictures:
            writer.send(np.ascontiguousarray(picture))
        writer.close()
    else:
        raise InputError(f"{path}: a turntable is a .gif or an .mp4.")
    partial.replace(path)


# --- shading ----------------------------------------------------------------------------------------------------


def _shaded(
    mesh: trimesh.Trimesh,
    camera: CameraRig,
    fragments: Fragments,
    shading: str,
    light: np.ndarray | None,
    line: float,
) -> np.ndarray:
    """Colours of the pixels of one view that see the mesh, `[P, 3]`."""
    mask = fragments.mask[0]
    if shading == "depth":
        middle = project(torch.zeros(1, 3), camera)[1].numpy()  # [1, 1]
        return np.repeat(0.5 + middle - fragments.depth[0][mask][:, None], 3, 1)  # the object sphere's diameter is 1
    ids, rotation = fragments.face_ids[0][mask], camera.camera_to_world[0, :3, :3].numpy()
    normals = np.asarray(mesh.face_normals, np.float32)[ids] @ rotation  # rows are R^T n
    normals *= np.where(normals[:, 2:] < 0, -1, 1)  # a face is seen from whichever side looks at us
    if shading == "normal":
        return normals * 0.5 + 0.5
    if shading == "wireframe":
        colors = np.repeat(CLAY * (1 - INK * _ink(mesh, camera, ids, mask, line)[:, None]), 3, 1)
    else:
        colors = surface_colors(mesh, ids, fragments.barycentrics[0][mask])
    if shading == "none":
        return colors
    key = KEY_LIGHT if light is None else light @ rotation
    return colors * (AMBIENT + DIFFUSE * np.clip(normals @ key.astype(np.float32), 0, 1))[:, None]


def _ink(
    mesh: trimesh.Trimesh,
    camera: CameraRig,
    face_ids: np.ndarray,  # [P]
    mask: np.ndarray,  # [H, W]
    line: float,
) -> np.ndarray:
    """How much the line of an edge covers each pixel, `[P]` in [0, 1]: lines reach `line` pixels from the edges they are on."""
    uv, _ = project(torch.as_tensor(np.asarray(mesh.vertices), dtype=torch.float32), camera)
    corners = ((uv[0].numpy() + 1) * (len(mask) / 2))[mesh.faces[face_ids]]  # [P, 3, 2]
    edges, offsets = np.roll(corners, -1, 1) - corners, np.argwhere(mask)[:, None, ::-1] + 0.5 - corners
    length = np.maximum(np.linalg.norm(edges, axis=-1), 1e-6)
    distance = np.abs(edges[..., 0] * offsets[..., 1] - edges[..., 1] * offsets[..., 0]) / length
    doubled = np.abs(edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0])
    room = doubled / length.sum(1) / (2 * line)  # radius of the inscribed circle, in widths of a line
    return np.clip(line + 0.5 - distance.min(1), 0, 1) * np.clip(room, 0.2, 1)
