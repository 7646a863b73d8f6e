"""The world in which a picture is placed right: analytic volumes and the placed outline are the oracles."""

import numpy as np
import pytest
import torch
from PIL import Image

from one2345pp.geometry.cameras import CameraRig, project
from one2345pp.geometry.placement import outline_circle, place_picture
from one2345pp.training.picture_world import SCALES, surface_points, to_picture, warp


RIG = CameraRig.named("zero123plus-v1.2")
TRUNCATION = 4 / 48


def ball(radius: float, middle=(0.0, 0.0, 0.0), side: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated distances to a ball in units of the truncation, and colours near its surface: red the more, the further right."""
    axis = (torch.arange(side) + 0.5) / side - 0.5
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    distance = ((points - torch.tensor(middle)).norm(dim=-1) - radius) / TRUNCATION
    sdf = distance.clamp(-1, 1)
    colors = torch.stack([2 * points[..., 0], points[..., 1], torch.full_like(sdf, 0.5)]) * (sdf.abs() < 1)
    return sdf, colors


def test_points_of_the_surface_lie_on_it():
    points = surface_points(ball(0.31, (0.05, -0.03, 0.08))[0])
    distance = (points - torch.tensor([0.05, -0.03, 0.08])).norm(dim=1) - 0.31
    assert len(points) > 1000 and distance.abs().max() < 0.3 / 48


@pytest.mark.parametrize("scale", [0.85, 1.0, 1.08])
def test_a_warped_ball_is_the_larger_ball_where_it_was_moved(scale):
    """Oracle: the distances of the ball that should come out, where they are known, and the colours of where they came from."""
    shift = torch.tensor([0.04, -0.02, 0.01])
    sdf, colors = warp(*ball(0.3), scale, shift)
    truth, _ = ball(0.3 * scale, shift.tolist())
    near = truth.abs() < 0.7
    assert (sdf - truth)[near].abs().max() < 0.1
    assert torch.equal(sdf[~near].sign(), truth[~near].sign())
    assert sdf.abs().max() <= 1
    coords = near.nonzero()
    origin = ((coords + 0.5) / 48 - 0.5 - shift) / scale
    red = colors[0][near]
    assert (red - 2 * origin[:, 0]).abs().max() < 0.02
    assert torch.allclose(colors[2][near], torch.tensor(0.5))


def test_what_leaves_the_volume_is_cut_off():
    sdf, _ = warp(*ball(0.3), 1.0, torch.tensor([0.4, 0.0, 0.0]))
    assert (sdf[:4] == 1).all()  # what came in from beyond is empty
    assert (sdf[-1] < 0).any()


@pytest.mark.parametrize(("middle", "radius"), [((0.0, 0.0), 0.9), ((0.05, -0.03), 0.85)])
def test_the_outline_becomes_that_of_the_picture(middle, radius):
    """Oracle: the circle that a camera of the placed picture sees about the warped ball."""
    x, y = np.meshgrid(*2 * [(np.arange(128) + 0.5) / 64 - 1])
    mask = torch.from_numpy(np.hypot(x - middle[0], y - middle[1]) <= radius)
    _, camera = place_picture(Image.fromarray(np.uint8(mask)[..., None] * np.uint8([9, 9, 9, 255])), RIG, 20.0)
    sdf, _ = to_picture(*ball(0.42, (-0.03, 0.02, 0.0)), mask, camera)
    uv = project(surface_points(sdf), camera)[0][0]
    found = (uv.amin(0) + uv.amax(0)) / 2
    assert torch.allclose(found, torch.tensor(middle), atol=0.015)
    assert (uv - found).norm(dim=1).max().item() == pytest.approx(radius, abs=0.02)
    assert outline_circle(mask.numpy())[2] / 64 == pytest.approx(radius, abs=0.02)


def test_the_scale_keeps_the_object_in_its_volume():
    mask = torch.ones(64, 64, dtype=torch.bool)
    _, camera = place_picture(Image.new("RGBA", (64, 64), (9, 9, 9, 255)), RIG, 0.0)
    small = ball(0.2)
    sdf, _ = to_picture(*small, mask, camera)
    assert (sdf < 0).sum() / (small[0] < 0).sum() == pytest.approx(SCALES[1] ** 3, rel=0.05)


def test_an_empty_volume_stays_as_it_is():
    sdf, colors = torch.ones(8, 8, 8), torch.zeros(3, 8, 8, 8)
    out = to_picture(sdf, colors, torch.ones(8, 8, dtype=torch.bool), RIG[:1])
    assert torch.equal(out[0], sdf) and torch.equal(out[1], colors)
