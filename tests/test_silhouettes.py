"""Distances to silhouettes against a brute-force search, and to the hull of a sphere against the sphere itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from one2345pp.geometry.cameras import CameraRig
from one2345pp.models.condition_encoder import HULL_BAND, ConditionEncoder, ViewBatch
from one2345pp.models.silhouettes import BAND, FINER, hull_distances, silhouette_distance


def test_distances_are_those_of_a_search_over_all_pixels():
    alpha = torch.full((2, 24, 24), -1.0)
    alpha[0, 5:15, 8:20] = 1
    alpha[1, 3, 3] = 1
    alpha[1, 18:, :4] = 1
    fine = F.interpolate(alpha[:, None], scale_factor=FINER, mode="bilinear", align_corners=False)
    pixels = torch.cartesian_prod(*[torch.arange(24 * FINER).float()] * 2)
    expected = []
    for mask in fine[:, 0] > 0:
        inside = mask.flatten()
        to_inside = torch.cdist(pixels, pixels[inside]).amin(1) - 0.5
        to_outside = torch.cdist(pixels, pixels[~inside]).amin(1) - 0.5
        nearest = torch.where(inside, -to_outside, to_inside)
        expected.append((nearest / (24 * FINER)).clamp(-BAND, BAND).view(24 * FINER, -1))
    torch.testing.assert_close(silhouette_distance(alpha), torch.stack(expected), atol=4e-5, rtol=0)


def test_an_empty_and_a_full_mask_are_far_on_one_side():
    assert (silhouette_distance(torch.full((1, 8, 8), -1.0)) == BAND).all()
    assert (silhouette_distance(torch.full((1, 8, 8), 1.0)) == -BAND).all()


def test_hull_distances_leave_out_missing_views_and_repeat_the_last():
    distances = torch.tensor([[0.3], [0.9], [0.1]])
    assert hull_distances(distances, torch.tensor([True, True, True]), 2).tolist() == [pytest.approx([0.9, 0.3])]
    assert hull_distances(distances, torch.tensor([True, False, True]), 2).tolist() == [pytest.approx([0.3, 0.1])]
    assert hull_distances(distances, torch.tensor([False, False, True]), 2).tolist() == [pytest.approx([0.1, 0.1])]
    assert hull_distances(distances, torch.zeros(3, dtype=torch.bool), 2).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("rig_name", ["zero123plus-v1.1", "zero123plus-v1.2"])
def test_distance_to_the_hull_of_a_sphere(rig_name):
    """On the great circle that a view shows as its outline, the hull's distance is the sphere's, to a fraction of a pixel."""
    rig = CameraRig.named(rig_name)
    side, radius = 96, 0.3
    rotation = rig.world_to_camera[:, :3, :3]
    position = -torch.einsum("vij,vi->vj", rotation, rig.world_to_camera[:, :3, 3])
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    rays = torch.stack([u, -v, torch.zeros_like(u)], -1) * rig.tan_half_fov[:, None, None, None]
    rays = F.normalize(rays - torch.tensor([0.0, 0.0, 1.0]), dim=-1)
    rays = torch.einsum("vij,vhwi->vhwj", rotation, rays)
    along = -(rays * position[:, None, None]).sum(-1)
    closest = (position[:, None, None] + along[..., None] * rays).norm(dim=-1)
    alpha = ((radius - closest) * 100).clamp(-1, 1)
    views = ViewBatch.make(torch.cat([torch.zeros(6, 3, side, side), alpha[:, None]], 1)[None], [rig])
    encoder = ConditionEncoder(resolution=8, channels=(4,), stem_channels=(4,), patch_channels=0, hull_distances=1)

    # the rays that touch the sphere do so a little before the great circle that faces the camera
    distance = position.norm(dim=-1, keepdim=True)
    toward, side_on = position / distance, rotation[:, 0]
    sine = radius / distance
    normal = sine * toward + (1 - sine**2).sqrt() * side_on
    offsets = torch.tensor([-0.05, -0.02, 0.0, 0.02, 0.05])
    points = normal[:, None] * (radius + offsets)[:, None]  # [6, 5, 3]
    for view in range(6):
        views.present[:] = torch.arange(6) == view
        got = encoder.hull(views, points[view], 0)[:, 0] * HULL_BAND
        torch.testing.assert_close(got, offsets, atol=0.004, rtol=0.1)
    views.present[:] = True
    every = encoder.hull(views, points.flatten(0, 1), 0)[:, 0].view(6, 5) * HULL_BAND
    assert (every > offsets - 0.006).all()  # the hull of six holds in more than that of one
    assert (every[:, :3] < 0.006).all()  # and holds the sphere
