"""How the picture that a mesh was made from looks at its front: from which height, in which proportions; and it as one more view.

Where a picture belongs beside the views, before there is a mesh, lives in `placement`.
"""

# H W pixels, E elevations

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import trimesh
from PIL import Image

from .cameras import CameraRig
from .framing import object_box
from .rasterize import rasterize


ELEVATIONS = (-10.0, 0.0, 10.0, 20.0, 30.0, 40.0)  # degrees above the horizon that pictures are taken from
USUAL, DOUBT = 10.0, 0.003  # the elevation that is assumed, and how much likeness a degree away from it has to gain
FOV = math.radians(30)
SIZE = 96  # pixels in which outlines are compared


@dataclass
class PictureFit:
    """A picture over the front of a mesh.

    Args:
        factors: How to stretch x, y and z of the mesh such that its front has the picture's proportions, `[3]`; see `stretch`.
            1 if the elevation was guessed.
        elevation: Degrees above the horizon from which the picture looks.
        view: The picture as `camera` sees the mesh as it is, before it is stretched: `RGBA`, the object's box on the mesh's.
        camera: A rig of one.
        likeness: Intersection over union of the mesh's outline and the picture's, each as large as its frame, 0 to 1.
    """

    factors: np.ndarray
    elevation: float
    view: Image.Image
    camera: CameraRig
    likeness: float


def fit_picture(
    mesh: trimesh.Trimesh,
    picture: Image.Image,
    elevation: float | None = None,
    limit: float = 1.25,
    view_size: int = 256,
) -> PictureFit:
    """Lay a picture over the front of a mesh by the boxes of their outlines.

    One picture from a known elevation fixes the proportions of the front; views that were drawn of it need not keep them. Both sides
    give way alike, the depth, which the picture does not show, stays. From a guessed elevation the mesh is not stretched: a little
    higher or lower makes flat things another shape.

    Args:
        mesh: Front at +Z.
        picture: `RGBA`. Where the object lies in it and how large it is does not matter.
        elevation: Degrees from which the picture was taken; by default that of `ELEVATIONS` from which the mesh looks most like it,
            10 if that says little.
        limit: Most that a side is stretched or shrunk.
        view_size: Pixels along a side of the fit's view.

    Raises:
        InputError: If the picture shows nothing.
    """
    elevations = ELEVATIONS if elevation is None else (elevation,)
    own = np.asarray(picture.getchannel("A")) >= 128
    box = object_box(own)
    masks = _outlines(mesh, _cameras(elevations), SIZE)  # [E, SIZE, SIZE]
    doubts = DOUBT * np.abs(np.array(elevations) - USUAL)
    figures = np.array([_likeness(mask, own) for mask in masks])  # [E, 2]
    chosen = int(np.argmax(figures @ [1, 0.3] - doubts))
    best, likeness = elevations[chosen], float(figures[chosen, 1])

    camera = _cameras([best])
    front = _outlines(mesh, camera, view_size)[0]
    if not front.any():  # thinner than a pixel
        return PictureFit(np.ones(3), best, Image.new("RGBA", (view_size, view_size)), camera, 0.0)
    left, top, right, bottom = object_box(front)
    wide, high = right - left, bottom - top
    ratio = (box[2] - box[0]) / (box[3] - box[1]) * high / wide
    factor = 1.0 if elevation is None else min(max(math.sqrt(ratio), 1 / limit), limit)
    view = Image.new("RGBa", (view_size, view_size))  # premultiplied, so that transparent colours do not bleed
    view.paste(picture.convert("RGBa").resize((wide, high), Image.Resampling.BICUBIC, box=box), (left, top))
    return PictureFit(np.array([factor, 1 / factor, 1.0]), best, view.convert("RGBA"), camera, likeness)


def outline_overlap(
    mesh: trimesh.Trimesh,
    views: list[Image.Image],
    rig: CameraRig,
) -> np.ndarray:  # [V]
    """Intersection over union of the mesh's outline and the mask of each view, `RGBA` of one size, as the rig's cameras see it."""
    masks = np.stack([np.asarray(view.getchannel("A")) >= 128 for view in views])
    return _overlap(_outlines(mesh, rig, masks.shape[-1]), masks)


def stretch(mesh: trimesh.Trimesh, factors: np.ndarray) -> trimesh.Trimesh:
    """A copy of the mesh, stretched about the middle of its box; texture and colours stay."""
    stretched, middle = mesh.copy(), mesh.bounds.mean(0)
    stretched.vertices = middle + factors * (mesh.vertices - middle)
    return stretched


def _cameras(elevations) -> CameraRig:
    return CameraRig.from_angles([0.0] * len(elevations), list(elevations), FOV, 0.5 / math.tan(FOV / 2))


def _outlines(mesh: trimesh.Trimesh, cameras: CameraRig, size: int) -> np.ndarray:
    return np.asarray(rasterize(mesh, cameras, size).mask) >= 0.5


def _likeness(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Overlap of two silhouettes, each stretched to a square, which says how they look but for their proportions; and with them. An
    elevation is known by the former, and a little by the latter, for outlines such as a box's that say nothing."""
    if not a.any() or not b.any():
        return [0.0, 0.0]
    return [float(_overlap(_framed(a, square), _framed(b, square))) for square in (True, False)]


def _overlap(
    a: np.ndarray,  # [..., H, W] bool
    b: np.ndarray,  # [..., H, W] bool
) -> np.ndarray:  # [...]
    """Intersection over union; 1 where there is nothing in either."""
    union = (a | b).sum((-2, -1))
    return np.where(union > 0, (a & b).sum((-2, -1)) / np.maximum(union, 1), 1.0)


def _framed(mask: np.ndarray, square: bool) -> np.ndarray:
    """What is covered, as large as fits into `[SIZE, SIZE]`; stretched to fill it if `square`."""
    left, top, right, bottom = object_box(mask)
    picture = Image.fromarray(np.uint8(255 * mask[top:bottom, left:right]))
    sides = np.array([SIZE, SIZE]) if square else np.ceil(SIZE * np.array(picture.size) / max(picture.size)).astype(int)
    framed = Image.new("L", (SIZE, SIZE))
    framed.paste(picture.resize(tuple(sides), Image.Resampling.BILINEAR), tuple((SIZE - sides) // 2))
    return np.asarray(framed) >= 128
