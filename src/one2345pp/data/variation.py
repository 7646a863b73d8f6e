"""Other objects out of the ones there are: stretched and recoloured, so that a network cannot learn a few thousand by heart."""

from __future__ import annotations

import math

import numpy as np
import trimesh

from ..geometry.mesh import normalize_to_sphere
from ..geometry.picture_fit import stretch


STRETCH = 1.4  # most that a side grows or shrinks before the object is made as large as it was
SATURATION, GAMMA = (0.5, 1.3), (0.8, 1.25)
COLOR_KEYS = ("views", "inputs", "colors")  # of a prepared sample; the first three channels are colours


def stretch_randomly(mesh: trimesh.Trimesh, rng: np.random.Generator) -> trimesh.Trimesh:
    """A copy of a mesh with each side grown or shrunk by up to `STRETCH`, in the sphere of radius 0.5 again."""
    limit = math.log(STRETCH)
    return normalize_to_sphere(stretch(mesh, np.exp(rng.uniform(-limit, limit, 3))))


def recolor_randomly(sample: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A copy of a prepared sample with all its colours changed alike: their hue turned, more or less saturated, lighter or darker."""
    angle, saturation, gamma = rng.uniform(0, 2 * math.pi), rng.uniform(*SATURATION), rng.uniform(*GAMMA)
    matrix = saturation * _turn_about_grey(angle) + (1 - saturation) * np.full((3, 3), 1 / 3)
    recolored = dict(sample)
    for key in COLOR_KEYS:
        if key in sample:
            values = sample[key].copy()
            colors = np.clip(values[..., :3] / np.float32(255) @ matrix.T.astype(np.float32), 0, 1)
            values[..., :3] = np.round(255 * colors**gamma)
            recolored[key] = values
    return recolored


def _turn_about_grey(angle: float) -> np.ndarray:
    """The rotation of RGB about its grey diagonal (Rodrigues), `[3, 3]`."""
    axis = np.full(3, 1 / math.sqrt(3))
    cross = np.cross(np.eye(3), axis)
    return math.cos(angle) * np.eye(3) - math.sin(angle) * cross + (1 - math.cos(angle)) * np.outer(axis, axis)
