"""Procedural objects: named ones for examples and tests, random ones for training. No files; rendering is in `geometry`.

Every object has flat colours on several parts, +Y up, its front to +Z, and fits in the sphere of radius 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import trimesh
from trimesh import creation

from ..errors import InputError
from ..geometry.mesh import normalize_to_sphere


SECTIONS = 40  # segments of a circle

WHITE, BLACK, RED, GREEN, BLUE = (240, 240, 236), (40, 40, 46), (202, 52, 48), (74, 142, 62), (52, 96, 190)
YELLOW, ORANGE, WOOD, STONE, CREAM = (240, 200, 60), (232, 132, 44), (150, 98, 58), (136, 138, 142), (244, 226, 196)


def shape(name: str) -> trimesh.Trimesh:
    """A named object.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in SHAPES:
        raise InputError(f"shape: got {name!r}, expected one of {', '.join(SHAPES)}.")
    return _assemble(SHAPES[name]())


def random_shape(generator: torch.Generator) -> trimesh.Trimesh:
    """Three to seven primitives with random sizes, places, turns and flat colours; half of them mirrored left to right."""

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)).numpy()

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    parts = []
    for index in range(integer(3, 8)):
        size = uniform(0.12, 0.5, 3) * (1.5 if index == 0 else 1.0)
        part = _primitive(integer(0, 5), size)
        turn = uniform(-math.pi, math.pi, 3) * (torch.rand((), generator=generator).item() < 0.4)
        part.apply_transform(trimesh.transformations.euler_matrix(*turn))
        part.apply_translation(uniform(-0.35, 0.35, 3) * (index > 0))
        color = uniform(20, 245, 3).astype(int)
        parts.append((part, color))
        if index > 0 and integer(0, 2):
            parts.append((_mirrored(part), color))
    return _assemble(parts)


def _primitive(kind: int, size: np.ndarray) -> trimesh.Trimesh:
    x, y, z = (float(s) for s in size)
    if kind == 0:
        return creation.box(extents=(x, y, z))
    if kind == 1:
        return creation.icosphere(subdivisions=3, radius=0.5).apply_scale((x, y, z))
    if kind == 2:
        return _upright(creation.cylinder(radius=x / 2, height=y, sections=SECTIONS))
    if kind == 3:
        return _upright(creation.cone(radius=x / 2, height=y, sections=SECTIONS)).apply_translation((0, -y / 2, 0))
    return creation.torus(major_radius=x / 2, minor_radius=0.15 * y + 0.02, major_sections=SECTIONS, minor_sections=16)


# --- named objects: lists of (part, colour), any scale ----------------------------------------------------------------


def mug() -> list:
    """A red mug with a white band, hollow, the handle to its left (+X)."""
    body = _lathe([(0, 0), (0.4, 0), (0.42, 0.04), (0.42, 1), (0.37, 1), (0.37, 0.07), (0, 0.07)])
    band = _lathe([(0.424, 0.4), (0.428, 0.4), (0.428, 0.62), (0.424, 0.62)], closed=True)
    handle = creation.torus(major_radius=0.24, minor_radius=0.055, major_sections=SECTIONS, minor_sections=16)
    return [(body, RED), (band, WHITE), (handle.apply_translation((0.5, 0.52, 0)), RED)]


def chair() -> list:
    """A wooden chair with a blue seat; the back is behind (-Z)."""
    legs = [(_box(0.08, 0.9, 0.08, x, 0.45, z), WOOD) for x in (-0.4, 0.4) for z in (-0.4, 0.4)]
    posts = [(_box(0.08, 1.0, 0.08, x, 1.45, -0.4), WOOD) for x in (-0.4, 0.4)]
    slats = [(_box(0.72, 0.14, 0.05, 0, y, -0.4), BLUE) for y in (1.3, 1.55, 1.8)]
    return [*legs, *posts, *slats, (_box(0.96, 0.1, 0.96, 0, 0.95, 0), BLUE)]


def table() -> list:
    """A round table on one foot."""
    return [
        (_cylinder(0.8, 0.08, 0, 0.9, 0), WOOD),
        (_cylinder(0.09, 0.9, 0, 0.45, 0), BLACK),
        (_cylinder(0.4, 0.06, 0, 0.03, 0), BLACK),
    ]


def lamp() -> list:
    """A table lamp with an open shade."""
    shade = _lathe([(0.48, 0.9), (0.28, 1.4), (0.26, 1.4), (0.46, 0.9)], closed=True)
    base = _lathe([(0, 0), (0.3, 0), (0.3, 0.06), (0.08, 0.14), (0, 0.14)])
    return [(shade, YELLOW), (base, STONE), (_cylinder(0.04, 1.1, 0, 0.6, 0), STONE), (_ball(0.11, 0, 1.1, 0), WHITE)]


def mushroom() -> list:
    """A toadstool: red cap with white dots."""
    stem = _lathe([(0, 0), (0.2, 0), (0.15, 0.3), (0.17, 0.62), (0, 0.62)])
    cap = _lathe([(0, 0.55), (0.5, 0.55), (0.55, 0.62), (0.48, 0.84), (0.3, 1.0), (0.12, 1.07), (0, 1.08)])
    dots = [
        (_ball(0.075, 0.43 * math.sin(a), 0.85 + 0.02 * (i % 2), 0.43 * math.cos(a)), WHITE)
        for i, a in enumerate(np.linspace(0, 2 * math.pi, 7)[:-1] + 0.3)
    ]
    return [(stem, CREAM), (cap, RED), *dots, (_ball(0.09, 0, 1.05, 0.05), WHITE)]


def rocket() -> list:
    """A white rocket with red nose and fins, a round window to the front."""
    body = _lathe([(0, 0.15), (0.2, 0.15), (0.27, 0.5), (0.26, 0.9), (0.2, 1.2), (0, 1.2)])
    nose = _lathe([(0, 1.2), (0.2, 1.2), (0.12, 1.42), (0, 1.6)])
    fins = []
    for angle in (0, 120, 240):
        fin = _box(0.05, 0.45, 0.3, 0, 0.2, -0.3)
        fins.append((fin.apply_transform(trimesh.transformations.rotation_matrix(math.radians(angle), (0, 1, 0))), RED))
    window = creation.torus(major_radius=0.1, minor_radius=0.03, major_sections=SECTIONS, minor_sections=12)
    jet = _lathe([(0, 0), (0.16, 0), (0.12, 0.16), (0, 0.16)])
    return [
        (body, WHITE),
        (nose, RED),
        *fins,
        (window.apply_translation((0, 0.85, 0.26)), STONE),
        (_ball(0.1, 0, 0.85, 0.2), BLUE),
        (jet, BLACK),
    ]


def snowman() -> list:
    """Three balls, a hat, a carrot to the front."""
    nose = creation.cone(radius=0.05, height=0.25, sections=SECTIONS).apply_translation((0, 1.32, 0.18))
    eyes = [(_ball(0.035, x, 1.4, 0.2), BLACK) for x in (-0.09, 0.09)]
    buttons = [(_ball(0.04, 0, y, z), BLACK) for y, z in ((0.95, 0.31), (0.8, 0.34))]
    hat = [(_cylinder(0.25, 0.03, 0, 1.53, 0), BLACK), (_cylinder(0.16, 0.25, 0, 1.65, 0), BLACK)]
    balls = [(_ball(0.45, 0, 0.4, 0), WHITE), (_ball(0.33, 0, 0.92, 0), WHITE), (_ball(0.23, 0, 1.34, 0), WHITE)]
    return [*balls, (nose, ORANGE), *eyes, *buttons, *hat]


def car() -> list:
    """A blue car driving to the front (+Z)."""
    wheels = []
    for x in (-0.36, 0.36):
        for z in (-0.5, 0.5):
            wheel = creation.cylinder(radius=0.19, height=0.14, sections=SECTIONS)
            turned = wheel.apply_transform(trimesh.transformations.rotation_matrix(math.pi / 2, (0, 1, 0)))
            wheels.append((turned.apply_translation((x, 0.19, z)), BLACK))
    lights = [(_ball(0.07, x, 0.38, 0.85), YELLOW) for x in (-0.25, 0.25)]
    cabin = [(_box(0.62, 0.26, 0.8, 0, 0.68, -0.1), WHITE), (_box(0.66, 0.05, 0.84, 0, 0.83, -0.1), BLUE)]
    return [(_box(0.74, 0.34, 1.7, 0, 0.38, 0), BLUE), *cabin, *wheels, *lights]


def house() -> list:
    """A cream house, its door to the front."""
    roof = creation.extrude_triangulation([(-0.65, 0), (0.65, 0), (0, 0.5)], [(0, 1, 2)], height=1.1)
    windows = [(_box(0.2, 0.2, 0.04, x, 0.45, 0.41), BLUE) for x in (-0.3, 0.3)]
    return [
        (_box(1.0, 0.8, 0.8, 0, 0.4, 0), CREAM),
        (roof.apply_translation((0, 0.8, -0.55)), RED),
        (_box(0.2, 0.42, 0.04, 0, 0.21, 0.41), WOOD),
        *windows,
        (_box(0.14, 0.4, 0.14, 0.32, 1.15, -0.2), STONE),
    ]


def tree() -> list:
    """A fir: three cones on a trunk."""
    cones = []
    for radius, bottom in ((0.5, 0.3), (0.4, 0.65), (0.28, 1.0)):
        cone = _upright(creation.cone(radius=radius, height=0.6, sections=SECTIONS))
        cones.append((cone.apply_translation((0, bottom, 0)), GREEN))
    return [(_cylinder(0.1, 0.4, 0, 0.2, 0), WOOD), *cones]


SHAPES: dict[str, Callable[[], list]] = {
    build.__name__: build for build in (mug, chair, table, lamp, mushroom, rocket, snowman, car, house, tree)
}


# --- parts ------------------------------------------------------------------------------------------------------------


def _assemble(parts: list) -> trimesh.Trimesh:
    """One mesh in the sphere of radius 0.5, every part with its own vertices and its flat colour."""
    meshes = []
    for part, color in parts:
        colors = np.tile(np.array([*color, 255], np.uint8), (len(part.vertices), 1))
        meshes.append(trimesh.Trimesh(part.vertices, part.faces, vertex_colors=colors, process=False))
    return normalize_to_sphere(trimesh.util.concatenate(meshes))


def _upright(part: trimesh.Trimesh) -> trimesh.Trimesh:
    """From trimesh's +Z axis to +Y."""
    return part.apply_transform(trimesh.transformations.rotation_matrix(-math.pi / 2, (1, 0, 0)))


def _lathe(profile: list, closed: bool = False) -> trimesh.Trimesh:
    """A profile of (radius, height) turned about the Y axis, outline counted so that normals point outwards."""
    return _upright(creation.revolve(np.array([*profile, profile[0]] if closed else profile, float), sections=SECTIONS))


def _box(x: float, y: float, z: float, *center: float) -> trimesh.Trimesh:
    return creation.box(extents=(x, y, z)).apply_translation(center)


def _ball(radius: float, *center: float) -> trimesh.Trimesh:
    return creation.icosphere(subdivisions=3, radius=radius).apply_translation(center)


def _cylinder(radius: float, height: float, *center: float) -> trimesh.Trimesh:
    return _upright(creation.cylinder(radius=radius, height=height, sections=SECTIONS)).apply_translation(center)


def _mirrored(part: trimesh.Trimesh) -> trimesh.Trimesh:
    mirrored = part.copy()
    mirrored.vertices = part.vertices * (-1, 1, 1)
    mirrored.invert()
    return mirrored
