"""Cameras: the contract's directions, projection against a hand-made pinhole. Files and rendering are tested elsewhere."""

import math

import numpy as np
import pytest
import torch

from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig, project


def test_azimuth_grows_to_the_cameras_right_and_elevation_is_up():
    """The contract: azimuth 0 is on +Z, 90 on +X; elevation 90 is above."""
    rig = CameraRig.from_angles([0, 90, 0], [0, 0, 90], 0.5, 2.0)
    expected = torch.tensor([[0.0, 0, 2], [2, 0, 0], [0, 2, 0]])
    assert torch.allclose(rig.positions, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "fov", "elevations"), [("zero123plus-v1.2", 30, (20, -10)), ("zero123plus-v1.1", 49.134, (30, -20))]
)
def test_named_rigs_are_those_of_the_contract(name, fov, elevations):
    rig = CameraRig.named(name)
    assert torch.allclose(torch.rad2deg(rig.fov), torch.full((6,), float(fov)), atol=1e-3)
    distance = 0.5 / math.tan(math.radians(fov) / 2)
    assert torch.allclose(rig.positions.norm(dim=1), torch.full((6,), distance), atol=1e-3)
    up = torch.rad2deg(torch.asin(rig.positions[:, 1] / rig.positions.norm(dim=1)))
    assert torch.allclose(up, torch.tensor(elevations * 3, dtype=torch.float32), atol=1e-3)
    azimuth = torch.rad2deg(torch.atan2(rig.positions[:, 0], rig.positions[:, 2])) % 360
    assert torch.allclose(azimuth, torch.tensor([30.0, 90, 150, 210, 270, 330]), atol=1e-3)


def test_projection_of_a_front_camera_by_hand():
    """A camera on +Z at 2 with 90 degrees sees x=1, y=0.5 at uv (0.5, -0.25): x right, y down."""
    rig = CameraRig.from_angles([0], [0], math.pi / 2, 2.0)
    uv, depth = project(torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 3.0]]), rig)
    assert torch.allclose(uv[0, 0], torch.tensor([0.5, -0.25]), atol=1e-6)
    assert depth[0].tolist() == pytest.approx([2.0, -1.0])


def test_rays_go_through_the_points_they_project_to():
    """Oracle: a point on a pixel's ray projects to that pixel's centre."""
    rig = CameraRig.named("zero123plus-v1.1")
    origins, directions = rig.rays(4, 4)
    points = origins + 1.7 * directions
    uv = torch.stack([project(points[v].reshape(-1, 3), rig[v])[0][0] for v in range(6)])
    x, y = torch.meshgrid((torch.arange(4) + 0.5) / 2 - 1, (torch.arange(4) + 0.5) / 2 - 1, indexing="xy")
    assert torch.allclose(uv, torch.stack([x, y], -1).reshape(1, -1, 2).expand(6, -1, -1), atol=1e-5)


def test_rotated_moves_every_azimuth():
    rig = CameraRig.from_angles([10, 50], [0, 20], 0.5, 2.0)
    assert torch.allclose(
        rig.rotated(30).camera_to_world, CameraRig.from_angles([40, 80], [0, 20], 0.5, 2.0).camera_to_world, atol=1e-6
    )


def test_unknown_rig_lists_the_known_ones():
    with pytest.raises(InputError, match="zero123plus-v1.2"):
        CameraRig.named("zero123")


def test_rigs_compare_by_their_cameras_and_take_any_integer():
    rig = CameraRig.named("zero123plus-v1.2")
    assert rig == CameraRig(rig.camera_to_world, rig.fov) and rig in [rig[:1], rig[:]]
    assert rig != CameraRig.named("zero123plus-v1.1") and rig != rig[:5] and rig != "zero123plus-v1.2"
    assert rig[np.int64(2)] == rig[2] and len(rig[np.int64(2)]) == 1


@pytest.mark.parametrize("cameras", [torch.eye(4), [CameraRig.named("zero123plus-v1.2")], None])
def test_what_is_no_rig_is_refused(cameras):
    with pytest.raises(InputError, match="cameras: got .*expected a CameraRig"):
        CameraRig.of(cameras)
