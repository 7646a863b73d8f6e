"""The front of a mesh gets the proportions of the picture it was made from, whatever the picture's size, place and elevation."""

import math

import numpy as np
import pytest
import trimesh
from PIL import Image

from one2345pp.data.shapes import shape
from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.export import export_mesh
from one2345pp.geometry.mesh import load_mesh
from one2345pp.geometry.picture_fit import ELEVATIONS, fit_picture, outline_overlap, stretch
from one2345pp.geometry.render import render


def photograph(mesh: trimesh.Trimesh, elevation: float, size: int = 128) -> Image.Image:
    """The mesh from the front, small and off the middle."""
    fov = math.radians(30)
    camera = CameraRig.from_angles([0.0], elevation, fov, 0.5 / math.tan(fov / 2))
    picture = Image.new("RGBA", (2 * size, 2 * size))
    picture.paste(Image.fromarray(render(mesh, camera, size, shading="none")[0]), (size // 2, size // 8))
    return picture


@pytest.mark.parametrize("elevation", [0.0, 10.0, 30.0])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("factors", [(1.1, 1 / 1.1, 1.0), (0.85, 1 / 0.85, 1.0), (1.0, 1.0, 1.0)])
def test_stretching_is_found(elevation, told, factors):
    """Oracle: the factors by which the mesh in the picture was stretched; untold, the elevation is found, and nothing stretched."""
    mesh = shape("mug")
    picture = photograph(stretch(mesh, np.array(factors)), elevation)
    fit = fit_picture(mesh, picture, elevation if told else None)
    found, where = fit.factors, fit.elevation
    if not told:
        assert found.tolist() == [1, 1, 1] and abs(where - elevation) <= 10
        return
    # seen from above, height is depth in part, which does not give way: what is found is smaller
    assert np.abs(found / factors - 1).max() < (0.03 if elevation <= 10 else 0.06)
    assert where == elevation


def test_only_so_much(tmp_path):
    """Oracle: the limit. A needle does not become a plate."""
    needle = trimesh.creation.box((0.05, 0.9, 0.05))
    plate = trimesh.creation.box((0.9, 0.1, 0.3))
    fit = fit_picture(needle, photograph(plate, 0.0), 0.0)
    np.testing.assert_allclose(fit.factors, (1.25, 0.8, 1.0))
    assert fit_picture(needle, photograph(plate, 0.0)).elevation in ELEVATIONS


def test_the_view_lies_on_the_mesh():
    """Oracle: what the fit's camera sees of the mesh itself, where the picture shows the mesh stretched: outline and colours."""
    mesh = shape("mug")
    picture = photograph(stretch(mesh, np.array((1.15, 1 / 1.15, 1.0))), 10.0)
    fit = fit_picture(mesh, picture, 10.0)
    own = render(mesh, fit.camera, fit.view.width, shading="none")[0].astype(float)
    view = np.asarray(fit.view).astype(float)
    masks = own[..., 3] >= 128, view[..., 3] >= 128
    assert (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() > 0.95
    both = masks[0] & masks[1]
    assert np.abs(own - view)[both][:, :3].mean() < 8


def test_stretched_meshes_keep_what_they_carry(tmp_path):
    """Oracle: faces, colours and coordinates of the file that is written; normals fit the new shape."""
    mesh = shape("mug")
    wide = stretch(mesh, np.array((1.2, 1 / 1.2, 1.0)))
    np.testing.assert_allclose(wide.extents, mesh.extents * (1.2, 1 / 1.2, 1), atol=1e-6)
    np.testing.assert_allclose(wide.bounds.mean(0), mesh.bounds.mean(0), atol=1e-6)
    again = trimesh.Trimesh(wide.vertices, wide.faces, process=False)
    np.testing.assert_allclose(wide.face_normals, again.face_normals, atol=1e-6)
    export_mesh(wide, tmp_path / "wide.glb")
    np.testing.assert_allclose(load_mesh(tmp_path / "wide.glb").extents, wide.extents, atol=1e-4)
    assert mesh.visual.kind == wide.visual.kind


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(InputError, match="transparent"):
        fit_picture(shape("mug"), Image.new("RGBA", (32, 32)), 0.0)


def test_a_mesh_that_cannot_be_seen_stays_as_it_is():
    """Edge-on, a plate without thickness has no front."""
    plate = trimesh.Trimesh([[0, -0.4, -0.4], [0, 0.4, -0.4], [0, 0, 0.4]], [[0, 1, 2]], process=False)
    fit = fit_picture(plate, photograph(shape("mug"), 10.0))
    assert fit.factors.tolist() == [1, 1, 1] and np.asarray(fit.view).max() == 0


@pytest.mark.parametrize("rig", [CameraRig.from_angles([0, 180], 0, 0.3, 4.0), CameraRig.orthographic([0, 180], 0)])
def test_outlines_overlap_as_their_areas_say(rig):
    """Oracle: a box half as wide covers half of what the whole one does, seen flat from the front; and nothing agrees with nothing."""
    whole = trimesh.creation.box(extents=(0.6, 0.4, 0.001))
    half = trimesh.creation.box(extents=(0.3, 0.4, 0.001))
    views = [Image.fromarray(view) for view in render(whole, rig, 96)]
    assert outline_overlap(whole, views, rig) == pytest.approx([1, 1], abs=0.02)
    assert outline_overlap(half, views, rig) == pytest.approx([0.5, 0.5], abs=0.03)
    away = trimesh.creation.box(
        extents=(0.1, 0.1, 0.1), transform=trimesh.transformations.translation_matrix([0, 9, 0])
    )
    empty = [Image.new("RGBA", (32, 32))] * 2
    assert outline_overlap(away, empty, rig).tolist() == [1, 1]
    assert outline_overlap(whole, empty, rig).tolist() == [0, 0]
