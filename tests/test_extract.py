"""Volumes to meshes against shapes whose area, volume and topology are known."""

import math

import numpy as np
import pytest
import torch
import trimesh

from one2345pp.errors import InputError
from one2345pp.geometry.extract import decimate, keep_components, volume_to_mesh
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


@pytest.mark.parametrize(
    ("distance", "volume", "euler", "tolerance"),
    [
        (ball, SPHERE * 0.35**3, 2, 0.01),
        (torus, 2 * math.pi**2 * 0.28 * 0.12**2, 0, 0.02),
        (box, 8 * 0.4 * 0.15 * 0.25, 2, 0.02),
        (two_balls, SPHERE * (0.2**3 + 0.12**3), 4, 0.02),
        (bowl, SPHERE / 2 * (0.4**3 - 0.32**3), 2, 0.04),
        (lambda p: box(p, (0.4, 0.015, 0.3)), 8 * 0.4 * 0.015 * 0.3, 2, 0.06),
    ],
    ids=["ball", "torus", "box", "two balls", "bowl", "thin plate"],
)
def test_known_shapes(distance, volume, euler, tolerance):
    """Oracle: closed formulas for volume and Euler number. A positive volume also proves outward winding."""
    mesh = volume_to_mesh(make_volume(distance))
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(volume, rel=tolerance)
    assert mesh.euler_number == euler


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


@pytest.mark.parametrize("radius", [0.04, 0.07])
def test_a_hole_in_the_band_is_closed(radius):
    """The inside leaks out through a hole punched in the band; the solid must come out all the same."""
    hole = make_volume(ball, drop=lambda p: (p[:, :2].norm(dim=-1) < radius) & (p[:, 2] > 0))
    mesh = volume_to_mesh(hole)
    assert mesh.is_watertight and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(SPHERE * 0.35**3, rel=0.02)


def test_a_hole_too_wide_to_close_turns_nothing_inside_out():
    """With a quarter of the band missing the shell stays a shell: outward winding, and no spike leaves the object."""
    mesh = volume_to_mesh(make_volume(ball, drop=lambda p: p[:, 2] > 0.15))
    assert mesh.is_watertight and mesh.volume > 0
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 0.35 + TRUNCATION


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


def test_decimate_keeps_the_budget_shape_and_colors():
    mesh = volume_to_mesh(make_volume(ball))
    small = decimate(mesh, 1000)
    assert 900 <= len(small.faces) <= 1000
    assert small.is_watertight and small.volume == pytest.approx(mesh.volume, rel=0.01)
    colors = np.asarray(small.visual.vertex_colors)[:, :3] / 255
    assert np.abs(colors - (small.vertices + 0.5)).max() < 0.02
    assert decimate(small, 1000) is small


def test_decimate_joins_vertices_that_files_split():
    """A mesh whose faces share no vertex cannot be collapsed as it stands."""
    mesh = volume_to_mesh(make_volume(ball))
    soup = trimesh.Trimesh(mesh.triangles.reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3), process=False)
    small = decimate(soup, 800)
    assert len(small.faces) <= 800 and small.is_watertight


def test_decimate_never_exceeds_the_budget_of_many_pieces():
    """Fifty boxes cannot each keep a shape within forty faces: either the budget holds, or the error says why."""
    shifts = [trimesh.transformations.translation_matrix([i, 0, 0]) for i in range(50)]
    boxes = trimesh.util.concatenate([trimesh.creation.box(extents=[0.5] * 3, transform=shift) for shift in shifts])
    try:
        assert 0 < len(decimate(boxes, 40).faces) <= 40
    except InputError as error:
        assert "pieces" in str(error)


def test_decimate_refuses_budgets_below_a_tetrahedron():
    with pytest.raises(InputError, match="at least 4"):
        decimate(trimesh.creation.box(), 3)
