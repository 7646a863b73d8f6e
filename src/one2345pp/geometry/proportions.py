"""The front of a mesh and the picture it was made from: as high for its width. Where a picture belongs lives in `placement`."""

# H W pixels, E elevations

from __future__ import annotations

import math

import numpy as np
import trimesh
from PIL import Image

from .cameras import CameraRig
from .framing import object_box
from .rasterize import rasterize


ELEVATIONS = (-10.0, 0.0, 10.0, 20.0, 30.0, 40.0)  # degrees above the horizon that pictures are taken from
USUAL, DOUBT = 10.0, 0.003  # the elevation that is assumed, and how much likeness a degree away from it has to gain
FOV = math.radians(30)
SIZE = 96


def proportions_of(
    mesh: trimesh.Trimesh,
    picture: Image.Image,
    elevation: float | None = None,
    limit: float = 1.25,
) -> tuple[np.ndarray, float]:
    """How to stretch a mesh such that its front is as high for its width as the picture's object.

    One picture fixes the proportions of the front; views that were drawn of it need not keep them. Both sides give way alike, the
    depth, which the picture does not show, stays.

    Args:
        mesh: Front at +Z.
        picture: `RGBA`. Where the object lies in it and how large it is does not matter.
        elevation: Degrees from which the picture was taken; by default that of `ELEVATIONS` from which the mesh looks most like it,
            10 if that says little.
        limit: Most that a side is stretched or shrunk.

    Returns:
        Factors of x, y and z, `[3]`, and the elevation.

    Raises:
        InputError: If the picture or the mesh shows nothing.
    """
    elevations = ELEVATIONS if elevation is None else (elevation,)
    cameras = CameraRig.from_angles([0.0] * len(elevations), list(elevations), FOV, 0.5 / math.tan(FOV / 2))
    masks = np.asarray(rasterize(mesh, cameras, SIZE).mask) >= 0.5  # [E, SIZE, SIZE]
    own = np.asarray(picture.getchannel("A")) >= 128
    doubts = DOUBT * np.abs(np.array(elevations) - USUAL)
    best = int(np.argmax([_likeness(mask, own) for mask in masks] - doubts))
    ratio = _width_for_height(own) / _width_for_height(masks[best])
    factor = min(max(math.sqrt(ratio), 1 / limit), limit)
    return np.array([factor, 1 / factor, 1.0]), elevations[best]


def stretch(mesh: trimesh.Trimesh, factors: np.ndarray) -> trimesh.Trimesh:
    """A copy of the mesh, stretched about the middle of its box; texture and colours stay."""
    stretched, middle = mesh.copy(), mesh.bounds.mean(0)
    stretched.vertices = middle + factors * (mesh.vertices - middle)
    return stretched


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two silhouettes, each stretched to a square, which says how they look but for their proportions; and a little of
    what it is with them, for outlines such as a box's that say nothing."""
    figures = []
    for square in (True, False):
        first, second = (_framed(mask, square) for mask in (a, b))
        figures.append((first & second).sum() / (first | second).sum())
    return figures[0] + 0.3 * figures[1]


def _framed(mask: np.ndarray, square: bool) -> np.ndarray:
    """What is covered, as large as fits into `[SIZE, SIZE]`; stretched to fill it if `square`."""
    left, top, right, bottom = object_box(mask)
    picture = Image.fromarray(np.uint8(255 * mask[top:bottom, left:right]))
    sides = np.array([SIZE, SIZE]) if square else np.ceil(SIZE * np.array(picture.size) / max(picture.size)).astype(int)
    framed = Image.new("L", (SIZE, SIZE))
    framed.paste(picture.resize(tuple(sides), Image.Resampling.BILINEAR), tuple((SIZE - sides) // 2))
    return np.asarray(framed) >= 128


def _width_for_height(mask: np.ndarray) -> float:
    left, top, right, bottom = object_box(mask)
    return (right - left) / (bottom - top)
