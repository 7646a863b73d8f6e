"""Care of meshes, against what is known of boxes, balls and pinches."""

import logging

import numpy as np
import pytest
import trimesh

from one2345pp.errors import InputError
from one2345pp.geometry import repair
from one2345pp.geometry.repair import decimate, is_solid, remove_degenerate, repair_mesh, weld


def colored_ball(subdivisions=5):
    """A ball of radius 0.4 coloured by position."""
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.4)
    colors = np.rint((mesh.vertices + 0.5) * 255)
    mesh.visual.vertex_colors = np.c_[colors, np.full(len(colors), 255)].astype(np.uint8)
    return mesh


def soup(mesh):
    """The same faces, none of which shares a vertex."""
    faces = np.arange(3 * len(mesh.faces)).reshape(-1, 3)
    return trimesh.Trimesh(mesh.triangles.reshape(-1, 3), faces, process=False)


def test_weld_joins_what_files_split():
    ball = colored_ball(2)
    assert not soup(ball).is_watertight
    assert weld(soup(ball)).is_watertight and len(weld(soup(ball)).vertices) == len(ball.vertices)


def test_weld_keeps_the_colors_of_a_texture():
    """Oracle: a texture of four colours, one a quarter, on a square with a corner in each."""
    square = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    image = trimesh.visual.material.Image.fromarray(
        np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
    ).resize((64, 64), 0)
    uv = np.array([[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]])
    square.visual = trimesh.visual.TextureVisuals(uv=uv, image=image)
    out = weld(square)
    expected = {(0, 0): [0, 0, 255], (1, 0): [9, 9, 9], (1, 1): [0, 255, 0], (0, 1): [255, 0, 0]}
    for vertex, color in zip(out.vertices, out.visual.vertex_colors, strict=True):
        assert color[:3].tolist() == expected[tuple(vertex[:2].astype(int))]


def test_folds_and_doubles_go():
    """A face and its back enclose nothing; a face given twice is one face."""
    ball = colored_ball(2)
    fold = [[0, 5, 9], [9, 5, 0]]
    messy = trimesh.Trimesh(ball.vertices, np.concatenate([ball.faces, fold, ball.faces[:3]]), process=False)
    assert is_solid(weld(messy)) and len(weld(messy).faces) == len(ball.faces)


def test_faces_without_area_are_flipped_away_and_leave_no_slit():
    """A vertex in the middle of a box's edge, joined up on one side by a face without area: closed before and after."""
    box = trimesh.creation.box()
    a, b, c = box.faces[0]
    middle = len(box.vertices)
    vertices = np.concatenate([box.vertices, [(box.vertices[a] + box.vertices[b]) / 2]])
    faces = np.concatenate([[[a, middle, c], [middle, b, c], [a, b, middle]], box.faces[1:]])
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight and mesh.area_faces.min() == 0
    whole = remove_degenerate(weld(mesh))
    assert is_solid(whole) and whole.area_faces.min() > 0 and len(whole.faces) == len(box.faces) + 2
    assert whole.volume == pytest.approx(1)


@pytest.mark.parametrize("missing", [[0], [0, 1], [0, 7, 100, 250]])
def test_small_holes_are_filled_and_large_ones_left(missing):
    """Oracle: the closed ball, before a few faces, or all of its upper half, were taken out."""
    ball = colored_ball(3)
    keep = np.ones(len(ball.faces), bool)
    keep[missing] = False
    whole = repair_mesh(trimesh.Trimesh(ball.vertices, ball.faces[keep], process=False))
    assert is_solid(whole) and whole.volume == pytest.approx(ball.volume, rel=1e-3)
    half = trimesh.Trimesh(ball.vertices, ball.faces[ball.triangles_center[:, 1] < 0], process=False)
    assert not repair_mesh(half).is_watertight


def test_a_mesh_without_any_area_is_refused():
    line = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2], [0, 0, 1]], process=False)
    with pytest.raises(InputError, match="has an area"):
        repair_mesh(line)


def test_only_outward_closed_surfaces_are_solid():
    ball = colored_ball(2)
    assert is_solid(ball) and is_solid(soup(ball))
    assert not is_solid(trimesh.Trimesh(ball.vertices, ball.faces[1:], process=False))
    assert not is_solid(trimesh.Trimesh(ball.vertices, ball.faces[:, ::-1], process=False))


@pytest.mark.parametrize("budget", [100, 1000, 5000, 19999])
def test_decimate_keeps_the_budget_shape_and_colors(budget):
    """Oracle: the ball itself, and colours that are a function of position."""
    mesh = colored_ball()
    small = decimate(mesh, budget)
    assert 0.99 * budget <= len(small.faces) <= budget
    assert is_solid(small) and small.volume == pytest.approx(mesh.volume, rel=5 / budget)
    colors = np.asarray(small.visual.vertex_colors)[:, :3] / 255
    assert np.abs(colors - (small.vertices + 0.5)).max() < 0.03
    assert decimate(small, budget) is small


def test_decimate_joins_vertices_that_files_split():
    """A mesh whose faces share no vertex cannot be collapsed as it stands."""
    small = decimate(soup(colored_ball()), 800)
    assert len(small.faces) == 800 and is_solid(small)


def test_decimate_never_exceeds_the_budget_of_many_pieces():
    """Fifty boxes cannot each keep a shape within forty faces: either the budget holds, or the error says what was reached."""
    shifts = [trimesh.transformations.translation_matrix([i, 0, 0]) for i in range(50)]
    boxes = trimesh.util.concatenate([trimesh.creation.box(extents=[0.5] * 3, transform=shift) for shift in shifts])
    try:
        assert 38 <= len(decimate(boxes, 40).faces) <= 40
    except InputError as error:
        assert "only to" in str(error) and "pieces" in str(error)


def test_decimate_draws_apart_what_touches_along_an_edge():
    """Two boxes that share one edge: it has four faces before, and every edge has two afterwards."""
    boxes = []
    for corner in (0.0, 1.0):
        box = trimesh.creation.box(bounds=[[corner, corner, 0.0], [corner + 1, corner + 1, 1.0]])
        for _ in range(3):
            box = box.subdivide()
        boxes.append(box)
    pinched = weld(trimesh.util.concatenate(boxes))
    assert not pinched.is_watertight
    small = decimate(pinched, len(pinched.faces) // 2)
    assert is_solid(small) and small.volume == pytest.approx(2, rel=0.01)


def test_a_lost_part_of_the_surface_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        decimate(colored_ball(), 5000)
        assert not caplog.records
        decimate(colored_ball(), 20)
    assert "decimate: the mesh lost" in caplog.text


def test_a_closed_mesh_that_decimation_opens_is_named(monkeypatch, caplog):
    """Oracle: a collapse that always loses two faces."""
    collapsed = repair._collapsed

    def torn(mesh, target, aggressiveness):
        out = collapsed(mesh, target, aggressiveness)
        return trimesh.Trimesh(out.vertices, out.faces[2:], process=False)

    monkeypatch.setattr(repair, "_collapsed", torn)
    with caplog.at_level(logging.WARNING):
        small = decimate(colored_ball(3), 600)
    assert not small.is_watertight and "was closed and has holes at" in caplog.text


def test_fewer_faces_than_asked_for_will_do(monkeypatch, caplog):
    """Oracle: a collapse that cannot come closer than 8 below the budget; nothing is refused, the most there can be is kept."""
    collapsed, targets = repair._collapsed, []

    def coarse(mesh, target, aggressiveness):
        targets.append(target)
        return collapsed(mesh, 492 - 20 * len(targets), aggressiveness)

    monkeypatch.setattr(repair, "_collapsed", coarse)
    with caplog.at_level(logging.WARNING):
        small = decimate(colored_ball(3), 500)
    assert len(targets) > 1 and 460 <= len(small.faces) <= 472
    assert "faces instead of 500" in caplog.text


def test_decimate_refuses_budgets_below_a_tetrahedron():
    with pytest.raises(InputError, match="at least 4"):
        decimate(trimesh.creation.box(), 3)
