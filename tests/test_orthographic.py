"""Orthographic cameras, alone and beside pinhole ones: all that takes a rig takes them. Bodies of known size are the oracles."""

import math
from dataclasses import replace

import numpy as np
import pretend_nvdiffrast
import pytest
import torch
import trimesh
from PIL import Image

from one2345pp.errors import InputError
from one2345pp.evaluation.baselines import visual_hull
from one2345pp.geometry.cameras import CameraRig, project, project_points
from one2345pp.geometry.placement import place_picture
from one2345pp.geometry.rasterize import rasterize
from one2345pp.geometry.render import render
from one2345pp.geometry.views import Views
from one2345pp.pipelines.pipeline_texture_refinement import TextureRefinementPipeline


FOUR = CameraRig.orthographic([0, 90, 180, 270], 0, width=1.0, distance=1.5)
MIXED = CameraRig.cat(
    [CameraRig.from_angles([20, 200], [10, -30], 0.6, 1.9), CameraRig.orthographic([75, 300], [40, 0], 1.3)]
)
SIDES = {"+x": (200, 0, 0), "-x": (0, 200, 200), "+z": (0, 0, 200), "-z": (200, 200, 0)}  # seen by the cameras of FOUR


def painted_box(side: float) -> trimesh.Trimesh:
    """A cube, each face of which is of one colour: those of `SIDES`, grey above and below."""
    box = trimesh.creation.box((side, side, side))
    box = trimesh.Trimesh(box.triangles.reshape(-1, 3), np.arange(36).reshape(12, 3), process=False)
    colors = np.full((12, 4), 128, np.uint8)
    for face, normal in enumerate(box.face_normals):
        axis = int(np.abs(normal).argmax())
        colors[face, :3] = SIDES.get(f"{'+' if normal[axis] > 0 else '-'}{'xyz'[axis]}", (128, 128, 128))
    box.visual.vertex_colors = np.repeat(colors, 3, 0)
    return box


def test_projection_by_hand():
    """A front camera that shows a width of 2 sees x=1, y=0.5 at the right border, a quarter up, however deep it lies."""
    rig = CameraRig.orthographic([0], [0], width=2.0, distance=3.0)
    points = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 2.0], [0.0, 0.0, 4.0]])
    uv, depth = project(points, rig)
    torch.testing.assert_close(uv[0], torch.tensor([[1.0, -0.5], [1.0, -0.5], [0.0, 0.0]]))
    assert depth[0].tolist() == pytest.approx([3, 1, -1])
    pinhole = MIXED[:2]
    without = project_points(points, pinhole.world_to_camera, pinhole.tan_half_fov)
    assert all(map(torch.equal, without, project(points, pinhole)))


def test_extents_and_directions_by_hand():
    """A pinhole of 90 degrees shows 3 world units to either side at depth 3; an orthographic camera of width 1 half of one at any."""
    rig = CameraRig.cat([CameraRig.from_angles([0], 0, math.pi / 2, 2.0), CameraRig.orthographic([90], 0)])
    torch.testing.assert_close(
        rig.half_extent(torch.tensor([[1.0, 3.0], [1.0, 3.0]])), torch.tensor([[1, 3], [0.5, 0.5]])
    )
    torch.testing.assert_close(rig.half_extent(torch.tensor([3.0, 3.0])), torch.tensor([3, 0.5]))
    directions = rig.directions_to(torch.tensor([[0.0, 0, 0], [0.0, 2, 0], [5, 5, 5]]))
    torch.testing.assert_close(directions[0, :2], torch.tensor([[0.0, 0, 1], [0, -math.sqrt(0.5), math.sqrt(0.5)]]))
    torch.testing.assert_close(directions[1], torch.tensor([[1.0, 0, 0]]).expand(3, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [0.7, 1.7])
def test_rays_and_projection_are_inverses(steps):
    """Oracle: a point on a pixel's ray projects to that pixel's centre, for both kinds in one rig, in pictures that are not square."""
    origins, directions = MIXED.rays(4, 6)
    assert origins.shape == directions.shape == (4, 4, 6, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(4, 4, 6))
    points = origins + steps * directions
    x, y = torch.meshgrid((torch.arange(6) + 0.5) / 3 - 1, (torch.arange(4) + 0.5) / 2 - 1, indexing="xy")
    for view in range(4):
        uv, depth = project(points[view].reshape(-1, 3), MIXED[view])
        torch.testing.assert_close(uv[0], torch.stack([x, y], -1).reshape(-1, 2), atol=1e-5, rtol=0)
        assert (depth > 0).all()
    torch.testing.assert_close(
        points[2:] - origins[2:], -steps * MIXED.camera_to_world[2:, None, None, :3, 2].expand(2, 4, 6, 3)
    )


def test_mixed_rigs_keep_each_cameras_kind():
    """Oracle: the rigs that it was made of."""
    pinhole, parallel = (
        CameraRig.from_angles([20, 200], [10, -30], 0.6, 1.9),
        CameraRig.orthographic([75, 300], [40, 0], 1.3),
    )
    assert MIXED[:2] == pinhole and MIXED[[2, 3]] == parallel and MIXED[3] == parallel[1]
    assert MIXED.is_orthographic.tolist() == [False, False, True, True]
    assert MIXED.fov[2:].tolist() == [0, 0] and MIXED.half_width.tolist() == pytest.approx([0, 0, 0.65, 0.65])
    assert parallel != CameraRig.orthographic([75, 300], [40, 0], 1.4)
    assert MIXED.rotated(30) == CameraRig.cat([pinhole.rotated(30), parallel.rotated(30)])
    torch.testing.assert_close(parallel.rotated(15).positions, CameraRig.orthographic([90, 315], [40, 0]).positions)
    named = replace(MIXED, name="mine")
    assert named.name == "mine" and named == MIXED and named.to("cpu").name == "mine" and named.to("cpu") == MIXED
    assert CameraRig(pinhole.camera_to_world, pinhole.fov, "third").name == "third"
    points = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    together, apart = project(points, MIXED), (project(points, pinhole), project(points, parallel))
    for index, whole in enumerate(together):
        torch.testing.assert_close(whole, torch.cat([part[index] for part in apart]))


@pytest.mark.parametrize(
    ("fov", "half_width"),
    [(0.0, None), (0.5, 0.5), (0.0, -1.0), (0.0, math.inf), (0.0, math.nan), (0.5, [0.0, 0.0, 0.0]), (0.0, [0, 1])],
)
def test_cameras_of_no_kind_or_of_two_are_refused(fov, half_width):
    poses = CameraRig.from_angles([0, 90], 0, 0.5, 2.0).camera_to_world
    with pytest.raises(InputError, match="half_width: "):
        CameraRig(poses, fov, half_width=half_width)


@pytest.fixture(params=["embree", "nvdiffrast"])
def rasterizer(request, monkeypatch):
    """Either; nvdiffrast as its documentation describes it, on a GPU that is pretended."""
    if request.param == "nvdiffrast":
        request.getfixturevalue("cuda")
        pretend_nvdiffrast.install(monkeypatch)
    return request.param


@pytest.mark.parametrize("distance", [0.6, 1.5, 40.0])
def test_silhouettes_are_of_their_own_size_from_any_distance(rasterizer, distance):
    """Oracles: a cube of half the width covers exactly half of either side's pixels, a sphere its circle's area; nearest depths."""
    rig = CameraRig.orthographic([0, 90], 0, width=1.0, distance=distance)
    square = np.zeros((64, 64), bool)
    square[16:48, 16:48] = True
    seen = rasterize(trimesh.creation.box((0.5, 0.5, 0.5)), rig, 64, rasterizer=rasterizer)
    assert np.array_equal(seen.mask, np.stack([square, square]))
    np.testing.assert_allclose(seen.depth[seen.mask], distance - 0.25, atol=1e-5)
    np.testing.assert_allclose(seen.barycentrics[seen.mask].sum(-1), 1, atol=1e-5)
    ball = rasterize(trimesh.creation.icosphere(3, 0.4), rig, 64, rasterizer=rasterizer)
    assert ball.mask.mean((1, 2)) == pytest.approx(math.pi * 0.16, rel=0.015)
    assert ball.depth.min((1, 2)) == pytest.approx(distance - 0.4, abs=2e-3)


def test_what_is_behind_an_orthographic_camera_is_not_seen(rasterizer):
    """Oracle: from its middle a ball is seen from inside, its farther half."""
    rig = CameraRig.orthographic([0, 90], 0, width=1.0, distance=0.0)
    seen = rasterize(trimesh.creation.icosphere(3, 0.4), rig, 32, rasterizer=rasterizer)
    assert seen.mask[:, 16, 16].all() and seen.depth[:, 16, 16] == pytest.approx(0.4, abs=3e-3)
    assert seen.depth[seen.mask].min() > 0


def test_both_rasterizers_agree_on_a_mixed_rig(cuda, monkeypatch):
    """Oracle: Embree. A near camera tells perspective apart; turned cameras and a wide picture tell axes apart."""
    pretend_nvdiffrast.install(monkeypatch)
    mesh = trimesh.creation.icosphere(1, 0.4)
    mesh.apply_scale((1, 0.7, 0.4))
    ours, theirs = (rasterize(mesh, MIXED, 40, 48, rasterizer=name) for name in ("embree", "nvdiffrast"))
    assert (ours.mask == theirs.mask).mean() > 0.99
    same = ours.mask & (ours.face_ids == theirs.face_ids)
    assert same.sum() > 0.97 * ours.mask.sum() > 1000
    np.testing.assert_allclose(ours.barycentrics[same], theirs.barycentrics[same], atol=1e-4)
    np.testing.assert_allclose(ours.depth[same], theirs.depth[same], atol=1e-4)


def test_a_pinhole_far_away_becomes_orthographic():
    """Oracle: twice as far away, with the lens that shows as much, the difference is half as large."""
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    flat, differences = project(points, CameraRig.orthographic([35], [20], 1.2))[0], []
    for distance in (50.0, 100.0):
        pinhole = CameraRig.from_angles([35], [20], 2 * math.atan(0.6 / distance), distance)
        differences.append((project(points, pinhole)[0] - flat).abs().max().item())
    assert differences[1] < 0.02 and differences[1] / differences[0] == pytest.approx(0.5, abs=0.03)
    mesh = trimesh.creation.icosphere(2, 0.45)
    near = render(mesh, CameraRig.orthographic([35], [20], 1.2), 48).astype(int)
    assert np.abs(near - render(mesh, pinhole, 48)).mean() < 0.5


def test_observed_colours_are_those_of_the_sides():
    """Oracle: the colour of the side that a sample lies on. It is seen along the optical axis, head-on, however far off the middle."""
    box, sides = painted_box(0.6), np.array([SIDES[side] for side in ("+z", "+x", "-z", "-x")]) / 255
    views = Views([Image.fromarray(view) for view in render(box, FOUR, 64, shading="none")], FOUR)
    visibility, samples = TextureRefinementPipeline().observe(box, views)
    view = (samples.normals @ FOUR.camera_to_world[:, :3, 2].T).argmax(1)
    np.testing.assert_allclose(samples.colors, sides[view], atol=0.01)
    torch.testing.assert_close(samples.directions, FOUR.camera_to_world[view, :3, 2])
    torch.testing.assert_close((samples.points * samples.directions).sum(1), torch.full((len(samples),), 0.3))
    assert (np.bincount(view, minlength=4) > 15_000).all()
    assert samples.weights.max() == pytest.approx(1, abs=1e-4)

    middles = torch.tensor([[0.3, 0.0, 0.2], [0.0, 0.3, 0.0], [-0.1, 0.1, -0.3]])
    normals = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, -1]])
    torch.testing.assert_close(visibility.confidence(middles, normals), torch.tensor([1.0, 0, 1]), atol=1e-3, rtol=0)
    assert visibility.confidence(middles, -normals).max() == 0


def test_what_an_orthographic_view_sees_is_told_by_a_few_pixels_of_depth():
    """Oracles: all of a side seen aslant, but for its border; and nothing of a plate close behind another that faces the same way."""
    rig = CameraRig.orthographic([50], 0, width=1.0)
    box = painted_box(0.6)
    views = Views([Image.fromarray(render(box, rig, 64, shading="none")[0])], rig)
    visibility, _ = TextureRefinementPipeline().observe(box, views)
    points = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)) * 0.4 - 0.2
    points[:, 2] = 0.3
    assert (visibility.confidence(points, torch.tensor([[0.0, 0, 1]]).expand(1000, 3)) > 0.1).float().mean() > 0.99

    front = trimesh.Trimesh([[-0.4, -0.4, 0], [0.4, -0.4, 0], [0, 0.4, 0]], [[0, 1, 2]], process=False)
    back = front.copy().apply_translation((0, 0, -0.05))
    plates = trimesh.util.concatenate([front, back])
    views = Views([Image.fromarray(render(plates, FOUR[:1], 64)[0])], FOUR[:1])
    visibility, _ = TextureRefinementPipeline().observe(plates, views)
    confidence = visibility.confidence(torch.tensor([[0.0, 0, 0], [0, 0, -0.05]]), torch.tensor([[0.0, 0, 1]] * 2))
    torch.testing.assert_close(confidence, torch.tensor([1.0, 0.0]), atol=1e-3, rtol=0)


def test_a_picture_is_placed_for_the_rigs_first_camera():
    """Oracle: what the camera that comes back sees of the mesh."""
    mesh = trimesh.creation.box((0.6, 0.7, 0.1))
    rig = CameraRig.cat([CameraRig.orthographic([90], 0, 1.1, 2.0), CameraRig.named("zero123plus-v1.2")])
    picture = Image.fromarray(render(mesh, CameraRig.orthographic([0], 0, 2.0), 128)[0])
    placed, camera = place_picture(picture, rig, 10.0)
    assert camera == CameraRig.orthographic([0], 10.0, 1.1, 2.0)
    assert place_picture(picture, rig[[1, 0]], 10.0)[1].is_orthographic.tolist() == [False]
    rows = np.nonzero(np.asarray(placed)[..., 3].max(1) >= 128)[0]
    assert (rows[-1] - rows[0] + 1) / 128 == pytest.approx(0.7 / math.hypot(0.6, 0.7) / 1.03, abs=0.03)


def test_the_hull_of_three_orthographic_views_is_the_box():
    """Oracle: a box is the hull of its views along the axes, coloured by the side that each saw."""
    box = painted_box(0.5)
    rig = CameraRig.cat([FOUR, CameraRig.orthographic([0, 0], [90, -90])])
    pictures = render(box, rig, 64, shading="none")
    hull = visual_hull(pictures[..., 3] / 255, rig, 32, pictures[..., :3] / 255)
    np.testing.assert_allclose(hull.bounds, [[-0.25] * 3, [0.25] * 3], atol=0.02)
    assert hull.volume == pytest.approx(0.125, rel=0.08)
    right = hull.visual.vertex_colors[(hull.vertices[:, 0] > 0.23) & (np.abs(hull.vertices[:, 1:]).max(1) < 0.2), :3]
    assert len(right) > 20 and np.abs(right.astype(int) - SIDES["+x"]).max() < 12


@pytest.mark.parametrize("rig", [FOUR, CameraRig.from_angles([0, 90, 180, 270], 0, 0.5, 3.0)])
def test_depth_is_drawn_about_the_origin(rig):
    """Oracle: the front of a box is 0.3 nearer than the origin; half grey is the origin, a grey level 1/255 of the sphere."""
    picture = render(trimesh.creation.box((0.6, 0.2, 0.6)), rig, 32, shading="depth")
    inner = picture[:, 15:17, 12:20]
    assert (inner[..., 3] == 255).all() and (inner[..., :3] == round(255 * 0.8)).all()
    assert picture[:, 0, :, 3].max() == 0
