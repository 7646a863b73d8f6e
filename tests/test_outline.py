"""A volume takes the outline of a picture: analytic bodies and what their camera sees are the oracles."""

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial import cKDTree

from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.extract import volume_to_mesh
from one2345pp.geometry.outline import fit_outline
from one2345pp.geometry.picture_fit import outline_overlap
from one2345pp.geometry.render import render
from one2345pp.geometry.volume import SparseVolume
from one2345pp.geometry.voxelize import SurfaceCloud


def box(sides, middle=(0.0, 0.0, 0.0), color=(200, 40, 40, 255)) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(sides)
    mesh.apply_translation(middle)
    mesh.visual.vertex_colors = np.tile(np.uint8(color), (len(mesh.vertices), 1))
    return mesh


BODY = box((0.5, 0.3, 0.3))
LEGS = [box((0.05, 0.3, 0.05), (x, -0.25, z), (40, 40, 200, 255)) for x in (-0.2, 0.2) for z in (0.1,)]


def volume_of(*meshes: trimesh.Trimesh) -> SparseVolume:
    return SurfaceCloud.from_mesh(trimesh.util.concatenate(meshes)).volume(64, 3 / 64)


def seen(camera: CameraRig, *meshes: trimesh.Trimesh) -> Image.Image:
    return Image.fromarray(render(trimesh.util.concatenate(meshes), camera, 128)[0])


def front(elevation: float, orthographic: bool = False) -> CameraRig:
    if orthographic:
        return CameraRig.orthographic([0.0], elevation)
    return CameraRig.from_angles([0.0], elevation, 0.52, 1.9)


@pytest.mark.parametrize("orthographic", [False, True])
@pytest.mark.parametrize("elevation", [0.0, 20.0])
def test_what_the_picture_does_not_show_is_cut(elevation, orthographic):
    """Oracle: the picture of the body alone, and the body's own volume."""
    camera = front(elevation, orthographic)
    picture = seen(camera, BODY)
    before = volume_of(BODY, box((0.1, 0.3, 0.1), (0.1, 0.25, 0.0)))
    mesh = volume_to_mesh(fit_outline(before, picture, camera))
    assert outline_overlap(volume_to_mesh(before), [picture], camera)[0] < 0.91
    assert outline_overlap(mesh, [picture], camera)[0] > 0.93
    assert mesh.volume == pytest.approx(0.5 * 0.3 * 0.3, rel=0.15)


@pytest.mark.parametrize("orthographic", [False, True])
@pytest.mark.parametrize("elevation", [0.0, 20.0])
def test_what_is_nearly_there_is_put_there(elevation, orthographic):
    """Oracle: legs that a network holds possible, but not likely, stand where it has them, as thick as the picture shows."""
    camera = front(elevation, orthographic)
    picture = seen(camera, BODY, *LEGS)
    truth, before = volume_of(BODY, *LEGS), volume_of(BODY, *LEGS)
    low = before.centers[:, 1] < -0.17
    before.sdf[low] = (before.sdf[low] + 0.03).clamp(max=before.truncation)
    assert outline_overlap(volume_to_mesh(before), [picture], camera)[0] < 0.91
    mesh = volume_to_mesh(fit_outline(before, picture, camera))
    assert outline_overlap(mesh, [picture], camera)[0] > 0.93
    added = mesh.vertices[mesh.vertices[:, 1] < -0.25]
    assert len(added) and np.abs(added[:, 2] - 0.1).max() < 0.06
    assert mesh.volume == pytest.approx(volume_to_mesh(truth).volume, rel=0.1)


@pytest.mark.parametrize("orthographic", [False, True])
def test_a_part_that_is_missing_hangs_together_with_the_rest(orthographic):
    """Oracle: legs of which the volume knows nothing reach the floor in one piece, no deeper or nearer than the body is."""
    camera = front(0.0, orthographic)
    legs = [box((0.05, 0.3, 0.05), (x, -0.25, -0.1)) for x in (-0.2, 0.2)]
    picture = seen(camera, BODY, *legs)
    mesh = volume_to_mesh(fit_outline(volume_of(BODY), picture, camera))
    assert outline_overlap(mesh, [picture], camera)[0] > 0.93
    assert len(mesh.split(only_watertight=False)) == 1 and mesh.is_watertight
    added = mesh.vertices[mesh.vertices[:, 1] < -0.2]
    assert added[:, 1].min() < -0.36 and np.abs(added[:, 2]).max() < 0.15 + 1 / 64


def test_what_is_a_little_too_narrow_grows_as_a_whole():
    """Oracle: the box that the picture shows, a cell wider on either side: its sides move, without a fin along their middle."""
    camera = front(0.0)
    wide, narrow = box((0.5, 0.3, 0.3)), box((0.5 - 2 / 64, 0.3, 0.3))
    mesh = volume_to_mesh(fit_outline(volume_of(narrow), seen(camera, wide), camera))
    # Further back the cone of the outline is wider than the box.
    side = mesh.vertices[(np.abs(mesh.vertices[:, 1]) < 0.1) & (np.abs(mesh.vertices[:, 2] - 0.09) < 0.05)]
    side = np.abs(side[np.abs(side[:, 0]) > 0.2][:, 0])
    assert side.min() > 0.25 - 0.6 / 64 and side.max() < 0.25 + 0.75 / 64
    assert mesh.volume == pytest.approx(wide.volume, rel=0.06)


def test_a_volume_that_fits_stays():
    camera = front(10.0)
    before = volume_of(BODY, *LEGS)
    after = fit_outline(before, seen(camera, BODY, *LEGS), camera)
    values = after.dense()[0][tuple(before.coords.T)]
    inner = before.sdf.abs() < 1 / 64
    assert (values - before.sdf)[inner].abs().max() < 1.2 / 64
    assert (values - before.sdf)[inner].abs().mean() < 0.1 / 64
    assert torch.equal(after.dense()[1:][(slice(None), *before.coords.T)].T, before.colors)


def test_new_cells_are_near_the_surface_and_coloured_as_their_nearest():
    """Oracles: the mesh, which new cells lie near, and a tree of the old cells. Far from both, what is made up stays out."""
    camera, before = front(0.0), volume_of(BODY, *LEGS)
    before.colors = torch.rand(before.colors.shape, generator=torch.Generator().manual_seed(0))
    after = fit_outline(before, seen(camera, BODY), camera)
    mesh = volume_to_mesh(after)
    old = cKDTree(before.coords.numpy())
    away, nearest = old.query(after.coords.numpy(), k=1)
    new = away > 0
    assert new.sum() > 100
    surface = cKDTree(trimesh.sample.sample_surface(mesh, 50_000, seed=0)[0])
    assert surface.query(after.centers.numpy()[new])[0].max() < before.truncation + 2 / 64
    for cell, color in zip(after.coords.numpy()[new][::50], after.colors.numpy()[new][::50], strict=True):
        ties = old.query_ball_point(cell, old.query(cell)[0] + 1e-6)
        assert (np.abs(before.colors.numpy()[ties] - color).max(1) == 0).any()


def test_where_the_volume_knows_nothing_nothing_is_added():
    camera = front(0.0)
    before = volume_of(BODY)
    after = volume_to_mesh(fit_outline(before, seen(camera, BODY, box((0.05, 0.1, 0.05), (0.0, 0.4, 0.0))), camera))
    assert after.bounds[1, 1] < 0.2


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(InputError, match="fully transparent"):
        fit_outline(volume_of(BODY), Image.new("RGBA", (32, 32)), front(0.0))
