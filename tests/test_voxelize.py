"""Mesh to volume: analytic distances, solidity of what is enclosed, open shells, azimuth frames."""

import numpy as np
import pytest
import torch
import trimesh

from one2345pp.errors import InputError
from one2345pp.geometry.extract import volume_to_mesh
from one2345pp.geometry.voxelize import SurfaceCloud


CELL = 1 / 32


def test_distance_to_a_sphere():
    """Oracle: |x| - r, within a tenth of a cell on average."""
    cloud = SurfaceCloud.from_mesh(trimesh.creation.icosphere(4, 0.4))
    volume = cloud.volume(32, 3.2 * CELL)
    expected = volume.centers.norm(dim=1) - 0.4
    assert (volume.sdf - expected).abs().mean() < 0.05 * CELL
    assert (volume.sdf - expected).abs().max() < 0.4 * CELL
    assert (volume.sdf.abs() < volume.truncation).all()


def test_a_limited_search_gives_the_same_distances_within_its_reach():
    """Oracle: the search without a limit; beyond the limit the sides are right and the distances infinite."""
    cloud = SurfaceCloud.from_mesh(trimesh.creation.icosphere(4, 0.4))
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (2000, 3))
    free, limited = cloud.signed_distance(points)[0], cloud.signed_distance(points, reach=0.05)[0]
    near = np.abs(free) < 0.049
    np.testing.assert_array_equal(limited[near], free[near])
    far = np.abs(free) > 0.051
    assert np.isinf(limited[far]).all() and (np.sign(limited[far]) == np.sign(free[far])).all()


def test_what_is_enclosed_is_solid():
    """A ball inside a ball is invisible: the volume is that of the outer one alone."""
    outer, inner = trimesh.creation.icosphere(4, 0.4), trimesh.creation.icosphere(3, 0.2)
    both = SurfaceCloud.from_mesh(trimesh.util.concatenate([outer, inner])).volume(32, 3.2 * CELL)
    assert both.centers.norm(dim=1).min() > 0.4 - 3.5 * CELL
    assert volume_to_mesh(both).volume == pytest.approx(outer.volume, rel=0.03)


def test_flipped_winding_makes_no_difference():
    mesh = trimesh.creation.icosphere(4, 0.4)
    mesh.invert()
    volume = SurfaceCloud.from_mesh(mesh).volume(32, 3.2 * CELL)
    assert (volume.sdf - (volume.centers.norm(dim=1) - 0.4)).abs().max() < 0.5 * CELL


def test_open_bowl_becomes_a_thin_wall_that_is_open():
    """Half a sphere without thickness: its inside is outside, its wall about as thick as a cell can hold."""
    mesh = trimesh.creation.icosphere(4, 0.4)
    mesh.update_faces(mesh.triangles_center[:, 1] < 0)
    volume = SurfaceCloud.from_mesh(mesh).volume(32, 3.2 * CELL)
    middle = (volume.centers[:, 1] < -0.1) & (volume.centers.norm(dim=1) < 0.3)
    assert (volume.sdf[middle] > 0).all()
    wall = volume_to_mesh(volume)
    half_area, rim = 2 * np.pi * 0.4**2, 2 * np.pi * 0.4 * 1.2 * CELL
    assert wall.area == pytest.approx(2 * half_area + rim, rel=0.15)
    assert 0.5 * CELL < wall.volume / half_area < 2 * CELL


def test_colours_are_those_of_the_nearest_surface():
    mesh = trimesh.creation.icosphere(4, 0.4)
    right = mesh.triangles_center[:, 0] > 0
    mesh.visual = trimesh.visual.ColorVisuals(
        mesh, face_colors=np.where(right[:, None], [255, 0, 0, 255], [0, 0, 255, 255]).astype(np.uint8)
    )
    volume = SurfaceCloud.from_mesh(mesh).volume(32, 3.2 * CELL)
    away = volume.centers[:, 0].abs() > 0.05
    red = volume.colors[:, 0] > 0.5
    assert (red[away] == (volume.centers[away, 0] > 0)).all()


def test_azimuth_frame_is_the_object_turned_back():
    """What sticks out to +X is at the front (+Z) of the frame whose camera stands on +X (azimuth 90)."""
    body = trimesh.creation.icosphere(3, 0.2)
    nose = trimesh.creation.box((0.2, 0.1, 0.1)).apply_translation([0.35, 0, 0])
    cloud = SurfaceCloud.from_mesh(trimesh.util.concatenate([body, nose]))
    inside = cloud.volume(32, 3.2 * CELL, azimuth=90).centers[cloud.volume(32, 3.2 * CELL, azimuth=90).sdf < 0]
    assert inside[:, 2].max() > 0.38
    assert inside[:, 0].abs().max() < 0.25


def test_same_mesh_same_volume():
    mesh = trimesh.creation.torus(0.3, 0.1)
    first, second = (SurfaceCloud.from_mesh(mesh).volume(32, 3.2 * CELL, 33.0) for _ in range(2))
    assert torch.equal(first.coords, second.coords)
    assert torch.equal(first.sdf, second.sdf)


def test_mesh_outside_the_sphere_is_refused():
    with pytest.raises(InputError, match="normalize_to_sphere"):
        SurfaceCloud.from_mesh(trimesh.creation.box((2, 2, 2)))
