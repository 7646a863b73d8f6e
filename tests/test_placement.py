"""A picture of the front beside six views: what its camera would really have seen is the oracle."""

import numpy as np
import pytest
import trimesh
from PIL import Image

from one2345pp.data.shapes import shape
from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.mesh import normalize_to_sphere
from one2345pp.geometry.placement import ROOM, outline_circle, place_picture
from one2345pp.geometry.render import render


RIG = CameraRig.named("zero123plus-v1.2")


def overlap(mesh: trimesh.Trimesh, elevation: float, fov: float, rig: CameraRig = RIG) -> tuple[float, float]:
    """Of a picture that was taken with another lens, framed and placed: its outline's IoU with what the camera that comes back
    sees, and how far its colours are from that."""
    taken = CameraRig.from_angles([0.0], elevation, fov, 0.5 / np.sin(fov / 2))
    picture = frame_object(Image.fromarray(render(mesh, taken, 160)[0]), 128)
    placed, camera = place_picture(picture, rig, elevation)
    truth = render(mesh, camera, 128)[0]
    a, b = np.asarray(placed)[..., 3] >= 128, truth[..., 3] >= 128
    colors = np.abs(np.asarray(placed)[a & b][:, :3].astype(int) - truth[a & b][:, :3]).mean()
    return (a & b).sum() / (a | b).sum(), colors


@pytest.mark.parametrize("sides", [(0.6, 0.8, 0.02), (0.9, 0.3, 0.1)])
def test_what_is_flat_is_placed_where_it_is(sides):
    """Oracle: a plate that fills the sphere is seen as far out as the sphere, `ROOM` from its margin."""
    assert overlap(normalize_to_sphere(trimesh.creation.box(sides)), 0.0, 0.52)[0] > 0.8


def test_the_circle_of_an_outline():
    """Oracle: a disc has its own, and an L that of its farthest corner about the middle of its box."""
    y, x = np.mgrid[:64, :64] + 0.5
    assert np.allclose(outline_circle(np.hypot(x - 30, y - 25) <= 12), (30, 25, 12), atol=0.7)
    corner = np.zeros((64, 64), bool)
    corner[10:50, 20:24] = corner[46:50, 20:50] = True
    assert np.allclose(outline_circle(corner), (35, 30, np.hypot(15, 20)))


@pytest.mark.parametrize("rig", [RIG, CameraRig.orthographic([90, 0], 0)])
@pytest.mark.parametrize(("elevation", "fov"), [(10.0, 0.52), (-10.0, 0.4), (30.0, 0.9)])
def test_a_framed_picture_is_about_what_the_camera_sees(elevation, fov, rig):
    """Oracle: the mesh, which has depth, drawn by the camera that comes back."""
    iou, colors = overlap(normalize_to_sphere(shape("mug")), elevation, fov, rig)
    assert iou > 0.65 and colors < 30


def test_the_picture_may_lie_anywhere_and_stays_whole():
    picture = Image.new("RGBA", (64, 64))
    picture.paste((200, 60, 40, 255), (2, 4, 26, 36))  # 24 by 32: its corners are 20 from the middle
    placed, camera = place_picture(picture, RIG, 15)
    box = Image.fromarray(np.uint8(255 * (np.asarray(placed)[..., 3] >= 128))).getbbox()
    scale = 32 / (20 * ROOM)
    assert np.allclose(box, (32 - 12 * scale, 32 - 16 * scale, 32 + 12 * scale, 32 + 16 * scale), atol=1)
    assert placed.getpixel((32, 32)) == (200, 60, 40, 255)
    x, y, z = camera.positions[0].tolist()
    assert len(camera) == 1 and abs(x) < 1e-5 and np.isclose(np.degrees(np.arctan2(y, z)), 15, atol=1e-3)


def test_nothing_to_place_is_said():
    with pytest.raises(InputError, match="fully transparent"):
        place_picture(Image.new("RGBA", (8, 8)), RIG, 10)
