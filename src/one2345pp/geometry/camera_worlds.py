"""Cameras of other worlds, told by what they look at, and refused with how to mend them. Files live in `camera_files`."""

# V views. A rig is a `CameraRig`, whose module imports this one.

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InputError


RADIUS = 0.5  # of the sphere about the origin that the object fits in
LEAST, MOST = 0.125, 3.0  # of a picture that the sphere covers: four tenths of a square one's width; twice its width
PARALLEL = 0.03  # a smaller eigenvalue of what is perpendicular to optical axes: they meet nowhere in particular


def refuse_other_worlds(
    rig,
    names: list[str],  # [V]
    tallness: Tensor,  # [V], heights of the pictures over their widths
) -> None:
    """Refuse cameras of a world in which the object is not in the sphere of radius 0.5 about the origin.

    A single camera is refused only if it sees nothing of the sphere. Cameras from which it is small or large are refused only if it
    is so from all of them: some may well stand far away or close up.

    Raises:
        InputError: With the name of a frame, what is wrong, and how to mend it.
    """
    unseen = ~_sees_sphere(rig, tallness)
    if unseen.any():
        name = names[int(unseen.nonzero()[0])]
        for convention, read, mend in _CONVENTIONS:
            if _sees_origin(read(rig), tallness).all():
                raise InputError(
                    f"{name}: its camera looks past the object at the origin, and would not if the matrices were {convention}. "
                    f"{mend}: transform_matrix is camera-to-world, with OpenGL's axes.{_about_their_world(read(rig))}"
                )
        raise InputError(
            f"{name}: its camera sees nothing of the sphere of radius {RADIUS} about the origin, in which the object is to be. "
            f"Move and scale the world, correct the matrix, or leave the frame out.{_about_their_world(rig)}"
        )
    covered = _coverage(rig, tallness)
    if covered.max() < LEAST:
        best, others, crop = covered.argmax(), "no more", ", or crop pictures that show it that small"
    elif covered.min() > MOST:
        best, others, crop = covered.argmin(), "no less", ""
    else:
        return
    share = 100 * covered[best].item()
    percent = f"{share:.2g}%" if share < 10 else f"{share:.0f}%" if share < 1e4 else "far more than all"
    raise InputError(
        f"{names[int(best)]}: the object's sphere of radius {RADIUS} would cover {percent} of the picture"
        f"{f', and {others} of others' if len(names) > 1 else ''}. Scale the world so that the object fits in the sphere of radius "
        f"{RADIUS} about the origin{crop}.{_about_their_world(rig)}"
    )


def _inverted(rig):
    return replace(rig, camera_to_world=rig.world_to_camera, name=None)


def _flipped(rig):
    return replace(rig, camera_to_world=rig.camera_to_world * torch.tensor([1.0, -1.0, -1.0, 1.0]), name=None)


# What matrices may be instead, the rig if they are, and how to mend them.
_CONVENTIONS = (
    ("world-to-camera", _inverted, "Invert the matrices"),
    ("of OpenCV's axes (y down, looking along +z)", _flipped, "Negate their second and third columns"),
    (
        "world-to-camera with OpenCV's axes (y down, looking along +z)",
        lambda rig: _flipped(_inverted(rig)),
        "Invert the matrices, then negate their second and third columns",
    ),
)


def _sees_origin(rig, tallness: Tensor) -> Tensor:
    """Which pictures show the origin, `[V]` bool."""
    x, y, z = rig.world_to_camera[:, :3, 3].T
    extent = rig.half_extent(-z)
    return (z < 0) & (x.abs() <= extent) & (y.abs() <= extent * tallness)


def _sees_sphere(rig, tallness: Tensor) -> Tensor:
    """Which pictures show anything of the sphere, or would if they were round about their corners, `[V]` bool."""
    origin, corner = rig.world_to_camera[:, :3, 3], (1 + tallness**2).sqrt()
    aside, depth, distance = origin[:, :2].norm(dim=1), -origin[:, 2], origin.norm(dim=1)
    angle = torch.asin((RADIUS / distance).clamp(max=1)) + torch.atan(rig.tan_half_fov * corner)
    pinhole = (torch.atan2(aside, depth) <= angle) | (distance <= RADIUS)
    orthographic = (aside <= RADIUS + rig.half_width * corner) & (depth > -RADIUS)
    return torch.where(rig.is_orthographic, orthographic, pinhole)


def _coverage(rig, tallness: Tensor) -> Tensor:
    """Area of the sphere's disc over that of the picture, if it were in its middle, `[V]`."""
    distance = rig.positions.norm(dim=1)
    tangent = RADIUS / (distance**2 - RADIUS**2).clamp(min=1e-6).sqrt()  # of the angle that its radius spans
    radius = torch.where(rig.is_orthographic, RADIUS / rig.half_width, tangent / rig.tan_half_fov)  # in half widths
    return math.pi / 4 * radius**2 / tallness


def _about_their_world(rig) -> str:
    """What else cameras tell of their world: the point that all look at, if it is not the origin, and another axis that is up."""
    eyes, right, forward = rig.positions, rig.camera_to_world[:, :3, 0], -rig.camera_to_world[:, :3, 2]
    said = ""
    across = torch.eye(3) - forward[:, :, None] * forward[:, None]  # projects onto what is perpendicular to each axis
    system = across.mean(0)
    if torch.linalg.eigvalsh(system)[0] > PARALLEL:
        centre = torch.linalg.solve(system, (across @ eyes[..., None]).mean(0)[:, 0])
        distance, ahead = (centre - eyes).norm(dim=1), ((centre - eyes) * forward).sum(1)
        off = (across @ (centre - eyes)[..., None])[..., 0].norm(dim=1)
        if ((off < 0.05 * distance) & (ahead > 0)).all() and centre.norm() > 0.1 * distance.mean():
            where = ", ".join(f"{round(value, 3) + 0:g}" for value in centre.tolist())
            said += f" All cameras look at ({where}): move that to the origin."
    if len(rig) > 2 and right[:, 2].abs().max() < 0.02 and right[:, 1].abs().max() > 0.5:
        said += " Their world seems to have +Z up: here +Y is up and the object's front +Z."
    return said
