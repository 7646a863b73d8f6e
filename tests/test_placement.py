"""A picture of the front beside six views: what its camera would really have seen is the oracle."""

import numpy as np
import pytest
from PIL import Image

from one2345pp.data.shapes import shape
from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.mesh import normalize_to_sphere
from one2345pp.geometry.placement import place_picture
from one2345pp.geometry.render import render


RIG = CameraRig.named("zero123plus-v1.2")


@pytest.fixture(scope="module")
def mug():
    mesh = normalize_to_sphere(shape("mug"))
    return mesh, render(mesh, RIG, 64)[..., 3] / 255


@pytest.mark.parametrize(("elevation", "fov"), [(10.0, 0.52), (-10.0, 0.4), (30.0, 0.9)])
def test_a_framed_picture_becomes_what_the_camera_sees(mug, elevation, fov):
    """Oracle: the mesh drawn by the camera that comes back. The picture was taken with another lens, and framed."""
    mesh, masks = mug
    taken = CameraRig.from_angles([0.0], elevation, fov, 0.5 / np.sin(fov / 2))
    picture = frame_object(Image.fromarray(render(mesh, taken, 160)[0]), 128)
    placed, camera = place_picture(picture, masks, RIG, elevation)
    truth = render(mesh, camera, 128)[0]
    a, b = np.asarray(placed)[..., 3] >= 128, truth[..., 3] >= 128
    assert (a & b).sum() / (a | b).sum() > 0.85
    assert np.abs(np.asarray(placed)[a & b][:, :3].astype(int) - truth[a & b][:, :3]).mean() < 25


def test_a_view_that_shows_nothing_is_left_out(mug):
    """Oracle: the same picture placed by the other five."""
    mesh, masks = mug
    picture = Image.fromarray(render(mesh, RIG.rotated(-30)[0], 64)[0])
    five, _ = place_picture(picture, masks[1:], RIG[[1, 2, 3, 4, 5]], 10)
    with_empty, _ = place_picture(picture, np.concatenate([0 * masks[:1], masks[1:]]), RIG, 10)
    assert np.array_equal(np.asarray(five), np.asarray(with_empty))


def test_nothing_to_place_is_said(mug):
    with pytest.raises(InputError, match="fully transparent"):
        place_picture(Image.new("RGBA", (8, 8)), mug[1], RIG, 10)
    with pytest.raises(InputError, match="masks are empty"):
        place_picture(Image.new("RGBA", (8, 8), "red"), np.zeros_like(mug[1]), RIG, 10)
