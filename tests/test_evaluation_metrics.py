"""Metrics and alignment against closed forms: spheres, planes, constant pictures, known similarities."""

import numpy as np
import pytest
import trimesh

from one2345pp.errors import InputError
from one2345pp.evaluation.align import align_yaw_icp, fit_similarity
from one2345pp.evaluation.metrics import SurfacePoints, handles, image_metrics, surface_metrics


def sphere(radius: float) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=5, radius=radius)


def lopsided() -> trimesh.Trimesh:
    """No symmetry: a wide base, a tower off its centre, a nose to the front."""
    parts = [
        trimesh.creation.box((0.5, 0.1, 0.3)),
        trimesh.creation.box((0.1, 0.4, 0.1)).apply_translation((-0.15, 0.2, 0.05)),
        trimesh.creation.box((0.1, 0.1, 0.2)).apply_translation((0.2, 0.0, 0.2)),
    ]
    return trimesh.util.concatenate(parts)


def similarity(scale: float, degrees: float, shift) -> np.ndarray:
    matrix = trimesh.transformations.rotation_matrix(np.deg2rad(degrees), (0, 1, 0))
    matrix[:3, :3] *= scale
    matrix[:3, 3] = shift
    return matrix


def test_truth_against_itself_scores_sampling_noise():
    """Oracle: the mean distance to the nearest of N random points on a surface of area A is sqrt(A / N) / 2 (Poisson)."""
    mesh, count = sphere(0.5), 20_000
    metrics = surface_metrics(SurfacePoints.from_mesh(mesh, count, 1), SurfacePoints.from_mesh(mesh, count, 0))
    assert metrics["chamfer_l2_mean"] == pytest.approx(np.sqrt(np.pi / count) / 2, rel=0.03)
    assert metrics["f_score@0.05"] == metrics["f_score@0.1"] == 1.0
    assert metrics["normal_consistency"] > 0.995


def test_known_offset_is_the_chamfer_distance():
    """Oracle: concentric spheres whose radii differ by d are d apart from everywhere; F switches from 0 to 1 at d."""
    offset = 0.03
    metrics = surface_metrics(
        SurfacePoints.from_mesh(sphere(0.5 + offset), 100_000, 1), SurfacePoints.from_mesh(sphere(0.5), 100_000, 0)
    )
    assert metrics["chamfer_l2_mean"] == pytest.approx(offset, rel=0.02)
    assert metrics["f_score@0.02"] == 0.0
    assert metrics["f_score@0.05"] == 1.0


def test_f_score_weighs_precision_and_recall():
    """Oracle: on a line, all of 4 predicted points are near one of the 8 true ones, which sees 4 of those near: F = 2/3."""
    line = np.stack([np.arange(8.0), np.zeros(8), np.zeros(8)], 1)
    normals = np.tile([0.0, 0.0, 1.0], (8, 1))
    metrics = surface_metrics(SurfacePoints(line[:4], normals[:4]), SurfacePoints(line, normals), (0.5,))
    assert metrics["f_score@0.5"] == pytest.approx(2 / 3)
    assert metrics["chamfer_l2_mean"] == pytest.approx((0 + (1 + 2 + 3 + 4) / 8) / 2)  # unsquared, directions averaged


def test_nearest_is_exact():
    """Oracle: all pairwise distances; the sorted queries must come back in the caller's order."""
    rng = np.random.default_rng(0)
    points, queries = rng.normal(size=(300, 3)), rng.normal(size=(200, 3))
    distances, indices = SurfacePoints(points, points).nearest(queries)
    table = np.linalg.norm(queries[:, None] - points, axis=-1)
    assert np.array_equal(indices, table.argmin(1))
    assert np.allclose(distances, table.min(1))


def test_inner_surfaces_do_not_count():
    """Proves that a shell with a small sphere inside scores as the shell alone, with the full number of points."""
    hidden = trimesh.util.concatenate([sphere(0.5), sphere(0.3)])
    points = SurfacePoints.from_mesh(hidden, 150_000, 1)
    assert len(points) == 150_000
    assert np.linalg.norm(points.points, axis=1).min() > 0.49


def test_samples_are_in_the_frame_of_the_mesh_and_seeded():
    """Proves that a mesh outside the world's sphere is sampled where it is, the same for one seed, another for another."""
    mesh = sphere(3.0).apply_translation((5, -2, 1))
    points = SurfacePoints.from_mesh(mesh, 5_000, 4).points
    assert np.allclose(np.linalg.norm(points - (5, -2, 1), axis=1), 3.0, atol=0.01)
    assert np.array_equal(points, SurfacePoints.from_mesh(mesh, 5_000, 4).points)
    assert not np.array_equal(points, SurfacePoints.from_mesh(mesh, 5_000, 5).points)


def test_transformed_scales_points_and_not_normals():
    """Oracle: a sphere's normals are its directions, before and after a similarity."""
    points = SurfacePoints.from_mesh(sphere(0.5), 2_000)
    moved = points.transformed(similarity(2.0, 70, (1, 2, 3)))
    directions = moved.points - (1, 2, 3)
    assert np.allclose(np.linalg.norm(directions, axis=1), 1.0, atol=0.01)
    assert (moved.normals * directions).sum(1).min() > 0.99


def test_image_metrics_of_constant_pictures():
    """Oracle: PSNR is -20 log10 of the difference; SSIM of constants is (2ab + c1) / (a^2 + b^2 + c1)."""
    a, b = np.full((2, 32, 32, 4), 255, np.uint8), np.full((2, 32, 32, 4), 255, np.uint8)
    a[..., :3], b[..., :3] = 51, 102
    metrics = image_metrics(a, b)
    assert metrics["psnr"] == pytest.approx(-20 * np.log10(0.2))
    assert metrics["ssim"] == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4))
    assert metrics["mask_iou"] == 1.0


def test_image_metrics_of_silhouettes():
    """Oracle: two rectangles of 3 and 2 columns share 1 of 4; colour under zero alpha is never seen."""
    a, b = np.zeros((1, 8, 8, 4), np.uint8), np.zeros((1, 8, 8, 4), np.uint8)
    a[..., 0] = 200
    a[0, :, 0:3, 3] = b[0, :, 2:4, 3] = 255
    assert image_metrics(a, b)["mask_iou"] == pytest.approx(1 / 4)
    assert image_metrics(a * 0, b * 0) == {"mask_iou": 1.0, "psnr": 60.0, "ssim": 1.0}
    nothing = a.copy()
    nothing[..., 3] = 0
    assert image_metrics(nothing, b * 0)["psnr"] == 60.0
    with pytest.raises(InputError, match="expected two of the same"):
        image_metrics(a[..., :3], b[..., :3])


def test_fit_similarity_recovers_it_and_never_mirrors():
    """Oracle: the known rotation, scale and shift; mirrored targets still give a rotation."""
    rng = np.random.default_rng(0)
    points, known = rng.normal(size=(50, 3)), similarity(0.7, 130, (0.3, -2, 1))
    assert np.allclose(fit_similarity(points, points @ known[:3, :3].T + known[:3, 3]), known)
    assert np.linalg.det(fit_similarity(points, points * (1, 1, -1))[:3, :3]) > 0


@pytest.mark.parametrize("degrees", [52, 187])
def test_alignment_undoes_a_known_similarity(degrees):
    """Oracle: the inverse of the similarity that moved the mesh, which has no symmetry to be mistaken for another pose."""
    mesh = lopsided()
    mesh.apply_scale(1 / mesh.extents.max())
    known = similarity(1.4, degrees, (0.4, -0.3, 0.2))
    pred = SurfacePoints.from_mesh(mesh, 8_000, 1).transformed(known)
    found = align_yaw_icp(pred, SurfacePoints.from_mesh(mesh, 8_000, 0))
    assert np.abs(found.matrix @ known - np.eye(4)).max() < 0.02
    assert found.inliers == 1.0


def test_alignment_survives_a_floater_that_spoils_the_box():
    """Proves that ICP finds the scale again when a fleck far off makes the start too small; pairs of one direction shrink to 0.3."""
    mesh = lopsided()
    mesh.apply_scale(1 / mesh.extents.max())
    known = similarity(1.4, 52, (0.4, -0.3, 0.2))
    clean, truth = (SurfacePoints.from_mesh(mesh, 6_000, seed) for seed in (1, 0))
    points = clean.points.copy()
    points[::200] = (1.2, 0.1, 0.0)
    found = align_yaw_icp(SurfacePoints(points, clean.normals).transformed(known), truth)
    assert np.abs(found.matrix @ known - np.eye(4)).max() < 0.06


def test_alignment_prefers_the_smaller_turn_of_a_symmetric_object():
    """Proves that a cube as it stands is not turned by 90 degrees, which would match its shape and lose its colours."""
    box = trimesh.creation.box((1, 1, 1))
    pred, truth = (SurfacePoints.from_mesh(box, 8_000, seed) for seed in (1, 0))
    assert np.abs(align_yaw_icp(pred, truth).matrix - np.eye(4)).max() < 0.02


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: trimesh.creation.icosphere(2, 0.3), 0),
        (lambda: trimesh.creation.torus(0.3, 0.1), 1),
        (lambda: trimesh.util.concatenate([trimesh.creation.torus(0.3, 0.1), trimesh.creation.box()]), 1),
    ],
    ids=["ball", "torus", "two pieces"],
)
def test_handles_are_the_holes_through_a_mesh(make, expected):
    """Oracle: known genus. Vertices split as files split them, and a face cut out, change nothing."""
    mesh = make()
    assert handles(mesh) == expected
    split = trimesh.Trimesh(mesh.triangles.reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3), process=False)
    assert handles(split) == expected
    opened = trimesh.Trimesh(mesh.vertices, mesh.faces[1:], process=False)
    assert handles(opened) == expected
