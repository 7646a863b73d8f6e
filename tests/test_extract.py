"""Volumes to meshes against shapes whose area, volume and topology are known."""

import logging
import math
import time

import numpy as np
import pytest
import torch
import trimesh

from one2345pp.errors import InputError
from one2345pp.geometry import extract
from one2345pp.geometry.extract import finish_mesh, keep_components, solidify, volume_to_mesh
from one2345pp.geometry.repair import weld
from one2345pp.geometry.volume import SparseVolume, cell_centers


RESOLUTION, TRUNCATION = 48, 0.07


def make_volume(distance, drop=None, resolution=RESOLUTION, truncation=TRUNCATION):
    """The band of a signed distance function, coloured by position, without the cells that `drop` marks."""
    coords = torch.cartesian_prod(*[torch.arange(resolution)] * 3)
    points = cell_centers(coords, resolution).double()
    sdf = distance(points)
    active = sdf.abs() < truncation
    if drop is not None:
        active &= ~drop(points)
    return SparseVolume(coords[active], sdf[active].float(), (points[active] + 0.5).float(), resolution, truncation)


def without(volume, gone):
    """The volume without the marked cells, `[N]` bool."""
    fields = (volume.coords[~gone], volume.sdf[~gone], volume.colors[~gone])
    return SparseVolume(*fields, volume.resolution, volume.truncation)


def ball(points, center=(0.0, 0.0, 0.0), radius=0.35):
    return (points - torch.tensor(center)).norm(dim=-1) - radius


def torus(points):
    ring = points[:, [0, 2]].norm(dim=-1) - 0.28
    return torch.stack([ring, points[:, 1]], -1).norm(dim=-1) - 0.12


def box(points, half=(0.4, 0.15, 0.25)):
    return (points.abs() - torch.tensor(half)).amax(-1)


def two_balls(points):
    return torch.minimum(ball(points, (0.22, 0.0, 0.0), 0.2), ball(points, (-0.25, 0.0, 0.0), 0.12))


def bowl(points):
    return torch.maximum((points.norm(dim=-1) - 0.36).abs() - 0.04, points[:, 1])


SPHERE = 4 / 3 * math.pi


def punched_shell(points):
    """A hollow ball with a hole through its wall, wider than the wall is thick."""
    hole = 0.12 - torch.where(points[:, 2] > 0, points[:, :2].norm(dim=-1), torch.inf)
    return torch.maximum((points.norm(dim=-1) - 0.34).abs() - 0.04, hole)


def thin_plate(points):
    return box(points, (0.4, 0.015, 0.3))


KNOWN = {  # distance, volume, area, Euler number, tolerance
    "ball": (ball, SPHERE * 0.35**3, 4 * math.pi * 0.35**2, 2, 0.01),
    "torus": (torus, 2 * math.pi**2 * 0.28 * 0.12**2, 4 * math.pi**2 * 0.28 * 0.12, 0, 0.02),
    "box": (box, 8 * 0.4 * 0.15 * 0.25, 8 * (0.4 * 0.15 + 0.15 * 0.25 + 0.25 * 0.4), 2, 0.02),
    "two balls": (two_balls, SPHERE * (0.2**3 + 0.12**3), 4 * math.pi * (0.2**2 + 0.12**2), 4, 0.02),
    "bowl": (bowl, SPHERE / 2 * (0.4**3 - 0.32**3), math.pi * (3 * 0.4**2 + 0.32**2), 2, 0.04),
    "thin plate": (thin_plate, 8 * 0.4 * 0.015 * 0.3, 8 * (0.4 * 0.015 + 0.015 * 0.3 + 0.3 * 0.4), 2, 0.06),
    "punched shell": (
        punched_shell,
        SPHERE * (0.38**3 - 0.3**3) * 0.97,
        4 * math.pi * (0.38**2 + 0.3**2) * 0.98,
        2,
        0.04,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes(name):
    """Oracle: closed formulas for volume, area and Euler number. A positive volume also proves outward winding."""
    distance, volume, area, euler, tolerance = KNOWN[name]
    mesh = volume_to_mesh(make_volume(distance))
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(volume, rel=tolerance)
    assert mesh.area == pytest.approx(area, rel=2 * tolerance)  # sharp edges are cut off
    assert mesh.euler_number == euler


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "thin plate"])
def test_gaps_between_coarse_cells_are_closed(name):
    """A tenth of the coarse cells is missing, as where a network overlooks some: no hole is torn, no part comes off.

    Walls thinner than a gap are left out: what lies before and behind outweighs what lies beside.

    Oracle: the mesh of the same volume without gaps.
    """
    whole = make_volume(KNOWN[name][0])
    random = np.random.default_rng(0)
    gone = torch.from_numpy(random.random([RESOLUTION // 2] * 3) < 0.1)
    mesh = volume_to_mesh(without(whole, gone[tuple((whole.coords // 2).T)]))
    expected = volume_to_mesh(whole)
    assert mesh.is_watertight and mesh.euler_number == expected.euler_number
    assert mesh.volume == pytest.approx(expected.volume, rel=0.04)
    assert mesh.area == pytest.approx(expected.area, rel=0.02)


def test_surface_lies_where_the_cells_say():
    """Oracle: an off-centre ball. Half a cell of shift, a swapped axis or a mirrored one would move its centre or radius."""
    center, radius = np.array([0.11, -0.07, 0.05]), 0.3
    mesh = volume_to_mesh(make_volume(lambda p: ball(p, center.tolist(), radius)))
    distances = np.linalg.norm(mesh.vertices - center, axis=1)
    assert np.abs(distances - radius).max() < 0.1 / RESOLUTION


def test_colors_are_interpolated_trilinearly():
    """Oracle: colour is a linear function of position, which trilinear interpolation reproduces to a rounding."""
    mesh = volume_to_mesh(make_volume(ball))
    expected = (mesh.vertices + 0.5) * 255
    assert np.abs(np.asarray(mesh.visual.vertex_colors)[:, :3] - expected).max() <= 1.0


@pytest.mark.parametrize("radius", [0.04, 0.07, 0.15])
def test_a_hole_in_the_band_is_closed(radius):
    """The inside leaks out through a hole punched in the band; the solid must come out all the same."""
    hole = make_volume(ball, drop=lambda p: (p[:, :2].norm(dim=-1) < radius) & (p[:, 2] > 0))
    mesh = volume_to_mesh(hole)
    assert mesh.is_watertight and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(SPHERE * 0.35**3, rel=0.03)


def test_half_a_band_still_bounds_a_solid():
    """With a third of the ball's band missing a membrane spans it: no more than the ball, and no less than what is left of it."""
    mesh = volume_to_mesh(make_volume(ball, drop=lambda p: p[:, 2] > 0.15))
    assert mesh.is_watertight and mesh.euler_number == 2
    height = 0.35 - 0.15
    cap = math.pi * height**2 * (3 * 0.35 - height) / 3
    assert 0.95 * (SPHERE * 0.35**3 - cap) < mesh.volume < SPHERE * 0.35**3
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 0.35 + 1 / RESOLUTION


def test_cells_without_any_outside_do_not_fill_the_grid():
    """Only the negative half of a ball's band: the surface stays near it, because what has no context is outside."""
    mesh = volume_to_mesh(make_volume(lambda p: ball(p, radius=0.15), drop=lambda p: p.norm(dim=-1) > 0.15))
    assert mesh.is_watertight and mesh.euler_number == 2
    assert 0.15 < np.linalg.norm(mesh.vertices, axis=1).max() < 0.3


def test_the_same_volume_gives_the_same_bytes():
    first, second = (volume_to_mesh(make_volume(bowl)) for _ in range(2))
    assert first.vertices.tobytes() == second.vertices.tobytes() and first.faces.tobytes() == second.faces.tobytes()


def test_a_volume_of_the_default_size_takes_no_time():
    """Far under two seconds of one core for 64 cells a side (0.2 s when written)."""
    volume = make_volume(torus, resolution=64, truncation=0.05)
    start = time.process_time()
    volume_to_mesh(volume)
    assert time.process_time() - start < 1.5


def test_enclosed_hollows_are_filled():
    """A hollow ball has no inner shell in the mesh: only one body, of the outer ball's volume."""
    mesh = volume_to_mesh(make_volume(lambda p: (p.norm(dim=-1) - 0.32).abs() - 0.06, truncation=0.05))
    assert mesh.body_count == 1
    assert mesh.volume == pytest.approx(SPHERE * 0.38**3, rel=0.02)


def test_an_object_cut_off_by_the_cube_is_closed_and_not_inverted():
    mesh = volume_to_mesh(make_volume(lambda p: box(p, (0.6, 0.3, 0.3))))
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(1.0 * 0.6 * 0.6, rel=0.03)


def test_floaters_are_dropped_and_real_parts_kept():
    def with_speck(points):
        return torch.minimum(two_balls(points), ball(points, (0.0, 0.4, 0.0), 0.02))

    assert volume_to_mesh(make_volume(with_speck)).body_count == 2
    assert volume_to_mesh(make_volume(with_speck), min_component=0.0).body_count == 3


def test_floaters_that_are_more_than_a_hundredth_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        volume_to_mesh(make_volume(two_balls))
        assert not caplog.records
        volume_to_mesh(make_volume(two_balls), min_component=0.5)
    assert "dropped 1 pieces with 26" in caplog.text


def test_exact_zeros_make_no_degenerate_faces():
    """A plane through cell centres: marching cubes would put several vertices on one grid point."""
    level = cell_centers(torch.tensor([30]), RESOLUTION).item()
    mesh = volume_to_mesh(make_volume(lambda p: (p - 0.0).abs().amax(-1) - level))
    assert mesh.is_watertight
    assert mesh.nondegenerate_faces().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: SparseVolume(v.coords[:0], v.sdf[:0], v.colors[:0], v.resolution, v.truncation), "no active cells"),
        (lambda v: SparseVolume(v.coords, v.sdf.abs() + 0.01, v.colors, v.resolution, v.truncation), "no surface"),
        (lambda v: SparseVolume(v.coords, v.sdf * math.nan, v.colors, v.resolution, v.truncation), "NaN"),
    ],
    ids=["empty", "all outside", "not finite"],
)
def test_volumes_without_a_surface_say_so(change, message):
    with pytest.raises(InputError, match=message):
        volume_to_mesh(change(make_volume(ball)))


def test_keep_components_drops_inner_shells():
    outer, inner = trimesh.creation.icosphere(radius=0.4), trimesh.creation.icosphere(radius=0.2)
    inner.invert()
    mesh = keep_components(trimesh.util.concatenate([outer, inner]))
    assert len(mesh.faces) == len(outer.faces)


def open_bowl():
    """A sheet: half a sphere without a thickness."""
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.4)
    return trimesh.Trimesh(ball.vertices, ball.faces[ball.triangles_center[:, 1] < 0], process=False)


def overlapping_boxes():
    boxes = [trimesh.creation.box([0.5, 0.3, 0.3]), trimesh.creation.box([0.3, 0.5, 0.2])]
    return trimesh.util.concatenate(boxes)


def inside_out():
    ball = trimesh.creation.icosphere(subdivisions=3, radius=2.0)
    ball.invert()
    ball.apply_translation([5, 0, 0])
    return ball


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [(open_bowl, 0.003, 0.02), (overlapping_boxes, 0.05, 0.077), (inside_out, 32.5, 34.0)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_solids_for_printing_come_from_anything(make, low, high):
    """Closed and wound outwards, in the mesh's own place and size; also after a trip through STL, which welds by position."""
    mesh = make()
    solid = solidify(mesh, resolution=64)
    joined = trimesh.load(trimesh.util.wrap_as_stream(solid.export(file_type="stl")), file_type="stl")
    for one in (solid, joined):
        assert one.is_watertight and one.is_winding_consistent and low < one.volume < high
    np.testing.assert_allclose(solid.bounds, mesh.bounds, atol=0.02 * mesh.scale)


def test_a_solid_is_printed_as_it_is():
    mesh = trimesh.creation.icosphere(subdivisions=2)
    assert len(solidify(mesh).faces) == len(mesh.faces)


def punched(mesh, radius):
    """The mesh without the faces whose middle lies within `radius` of the +X axis, on that side: a hole or a tunnel's mouth."""
    middle = mesh.triangles_center
    hole = (middle[:, 0] > 0) & (np.linalg.norm(middle[:, 1:], axis=1) < radius)
    return trimesh.Trimesh(mesh.vertices, mesh.faces[~hole], process=False)


def punched_shell():
    """A hollow ball whose outer and inner skins have small holes."""
    outer = trimesh.creation.icosphere(subdivisions=4, radius=0.4)
    inner = trimesh.creation.icosphere(subdivisions=3, radius=0.3)
    inner.invert()
    return trimesh.util.concatenate([punched(outer, 0.05), punched(inner, 0.04)])


def test_a_punched_shell_is_finished_watertight_and_full(caplog):
    """Oracle: the outer ball's volume, within the flat lid's cap and the budget; the inner skin that goes is named."""
    with caplog.at_level(logging.WARNING):
        mesh = finish_mesh(punched_shell(), 800, watertight=True)
    assert mesh.is_watertight and mesh.body_count == 1 and 792 <= len(mesh.faces) <= 800
    assert mesh.volume == pytest.approx(SPHERE * 0.4**3, rel=0.02)
    assert "solidify: the mesh lost" in caplog.text


def test_what_touches_along_an_edge_is_printed_without_rebuilding():
    """Two cubes that share an edge: drawn apart, they keep their 24 faces and their volume."""
    boxes = [trimesh.creation.box(bounds=[[i, i, 0], [i + 1, i + 1, 1]]) for i in (0, 1)]
    pinched = weld(trimesh.util.concatenate(boxes))
    solid = solidify(pinched)
    assert not pinched.is_watertight and solid.is_watertight
    assert len(solid.faces) == 24 and solid.volume == pytest.approx(2, rel=0.02)


def test_finishing_nothing_changes_nothing():
    mesh = punched_shell()
    assert finish_mesh(mesh) is mesh


def test_a_solid_that_a_budget_would_open_is_refused(monkeypatch):
    """Oracle: a decimation that always loses a face."""
    monkeypatch.setattr(
        extract, "decimate", lambda mesh, faces: trimesh.Trimesh(mesh.vertices, mesh.faces[1:], process=False)
    )
    with pytest.raises(InputError, match="watertight within 100 faces. Allow more"):
        finish_mesh(trimesh.creation.icosphere(), 100, watertight=True)


def test_a_volume_is_read_as_it_was_saved_and_nothing_else_is(tmp_path):
    """Oracle: the volume itself; no file, a text and another program's tensors are refused with the file's name."""
    from safetensors.torch import save_file

    volume = SparseVolume(torch.tensor([[1, 2, 3]]), torch.tensor([0.01]), torch.tensor([[0.1, 0.2, 0.3]]), 8, 0.05)
    volume.save(tmp_path / "a.safetensors")
    again = SparseVolume.load(tmp_path / "a.safetensors")
    assert torch.equal(again.coords, volume.coords) and torch.equal(again.sdf, volume.sdf)
    assert torch.equal(again.colors, volume.colors) and (again.resolution, again.truncation) == (8, 0.05)
    (tmp_path / "text").write_text("no tensors")
    save_file({"coords": torch.zeros(1)}, tmp_path / "other")
    for name in ("none", "text", "other"):
        with pytest.raises(InputError, match=f"{name}: .*volume"):
            SparseVolume.load(tmp_path / name)
