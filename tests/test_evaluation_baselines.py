"""Baselines against shapes whose hull and silhouette are known."""

import numpy as np
import pytest
import torch
import trimesh

from one2345pp.errors import InputError
from one2345pp.evaluation.baselines import extruded_silhouette, visual_hull
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.rasterize import EmbreeScene, rasterize
from one2345pp.geometry.render import render


RIG = "zero123plus-v1.2"


def asymmetric() -> trimesh.Trimesh:
    """Long to +X, high on one side, with a red front and a blue rest."""
    parts = [
        trimesh.creation.box((0.6, 0.15, 0.2)).apply_translation((0.05, -0.1, 0)),
        trimesh.creation.box((0.15, 0.3, 0.2)).apply_translation((0.25, 0.1, 0)),
    ]
    mesh = trimesh.util.concatenate(parts)
    front = mesh.face_normals[:, 2] > 0.9
    mesh.visual.face_colors = np.where(front[:, None], (255, 0, 0, 255), (0, 0, 255, 255)).astype(np.uint8)
    return mesh


@pytest.fixture(scope="module")
def views() -> np.ndarray:
    return render(asymmetric(), CameraRig.named(RIG), 128, shading="none").astype(np.float32) / 255


def test_hull_contains_the_object_and_casts_its_masks(views):
    """Oracle: the definition of a hull. It holds the object (to a cell), and its silhouettes are the given ones."""
    hull = visual_hull(views[..., 3], RIG, resolution=64)
    assert hull.is_watertight and hull.volume > asymmetric().volume
    boxes = np.stack([part.bounds for part in asymmetric().split(only_watertight=False)])  # [2, low and high, 3]
    low, high = boxes[:, :1] + 1.5 / 64, boxes[:, 1:] - 1.5 / 64
    points = (low + np.random.default_rng(0).random((2, 200, 3)) * (high - low)).reshape(-1, 3)
    exits = EmbreeScene(hull).cast(points, np.tile([1.0, 0.0, 0.0], (len(points), 1)))[0]
    assert (exits >= 0).all() and (
        hull.face_normals[exits, 0] > 0
    ).all()  # every way out of the object passes from inside
    cast, given = rasterize(hull, CameraRig.named(RIG), 128).mask, views[..., 3] >= 0.5
    assert ((cast & given).sum((1, 2)) / (cast | given).sum((1, 2))).min() > 0.9


def test_hull_of_a_sphere_has_its_size():
    """Oracle: six silhouettes of a sphere bound it from outside: the radius is right where a view grazes, the volume a bit above."""
    ball = trimesh.creation.icosphere(4, radius=0.3)
    hull = visual_hull(rasterize(ball, CameraRig.named(RIG), 128).mask, RIG, resolution=64)
    assert np.linalg.norm(hull.vertices, axis=1).min() == pytest.approx(0.3, abs=0.02)
    assert 1.0 < hull.volume / ball.volume < 1.35


def test_hull_takes_colours_from_the_views_that_see_them(views):
    """Oracle: the object's own colours, front red and back blue."""
    hull = visual_hull(views[..., 3], RIG, resolution=48, images=views[..., :3])
    colors, normals = hull.visual.vertex_colors[:, :3], hull.vertex_normals
    assert (colors[normals[:, 2] > 0.9].mean(0) > (150, -1, -1)).all()
    assert (colors[normals[:, 2] < -0.9].mean(0) > (-1, -1, 150)).all()


def test_hull_is_the_object_sphere_where_nothing_is_known():
    """Proves that what a close camera cannot see stays: full masks leave the whole sphere of radius 0.5, and no corner of the cube."""
    close = CameraRig.from_angles([0.0, 90.0], 0.0, 0.3, 1.0)
    hull = visual_hull(torch.ones(2, 16, 16), close, resolution=32)
    assert hull.volume == pytest.approx(np.pi / 6, rel=0.03)
    assert np.linalg.norm(hull.vertices, axis=1).max() < 0.5 + 1 / 32


def test_silhouette_faces_front_and_is_as_deep_as_wide():
    """Oracle: a 20 x 40 rectangle is a box of sides 1 : 2 : 1 whose corners lie on the sphere of radius 0.5."""
    mask = np.zeros((64, 64))
    mask[10:50, 5:25] = 1
    mesh = extruded_silhouette(mask)
    assert mesh.is_watertight and mesh.volume > 0
    assert mesh.extents / mesh.extents[1] == pytest.approx((0.5, 1.0, 0.5), abs=0.05)
    assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(0.5)


def test_silhouette_keeps_left_right_up_down_and_colours():
    """Oracle: an L of red (upper left) over green (lower right), seen again from the front."""
    picture = np.zeros((48, 48, 4), np.uint8)
    picture[8:24, 8:24] = (255, 0, 0, 255)
    picture[24:40, 8:40] = (0, 255, 0, 255)
    mesh = extruded_silhouette(picture)
    vertices, colors = mesh.vertices, mesh.visual.vertex_colors
    upper = vertices[:, 1] > 0.05
    assert vertices[upper, 0].max() < 0.05  # upper part only at the viewer's left, -X
    assert (colors[upper, 0] > 200).all()
    assert (colors[vertices[:, 1] < -0.05, 1] > 200).all()


def test_baselines_say_what_is_wrong():
    """Proves the messages: wrong number of masks, nothing covered, wrong shape."""
    with pytest.raises(InputError, match="one for each camera"):
        visual_hull(np.ones((5, 8, 8)), RIG)
    with pytest.raises(InputError, match="leave nothing"):
        visual_hull(np.zeros((6, 8, 8)), RIG, resolution=8)
    with pytest.raises(InputError, match="nothing in it is covered"):
        extruded_silhouette(np.zeros((8, 8)))
    with pytest.raises(InputError, match=r"expected \[H, W\]"):
        extruded_silhouette(np.zeros((8, 8, 3)))
