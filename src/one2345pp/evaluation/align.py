"""Alignment of a prediction with the truth before measuring: a search over yaws, then ICP with scale.

The numbers measured afterwards live in `metrics`. Axes: P points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .metrics import SurfacePoints


@dataclass(frozen=True)
class Alignment:
    """A similarity from the prediction's frame to the truth's, and how well it fits.

    Args:
        matrix: `[4, 4]`.
        inliers: Share of points within the threshold of the other set, mean of the two directions.
        distance: Mean distance to the other set, mean of the two directions.
    """

    matrix: np.ndarray
    inliers: float
    distance: float


def align_yaw_icp(
    pred: SurfacePoints,
    truth: SurfacePoints,
    yaws: int = 24,
    threshold: float = 0.05,
    search_points: int = 1_500,
    final_points: int = 10_000,
    search_iterations: int = 15,
    final_iterations: int = 20,
    candidates: int = 8,
) -> Alignment:
    """Find the similarity that brings the prediction closest to the truth.

    Starts are the pose as it stands, and every yaw about +Y with centred boxes and equal longest sides. The `candidates`
    best starts go through ICP on few points, and the one with the best inlier ratio on many points through ICP on those.
    Near ties go to the smaller distance, then to the smaller turn.

    Args:
        pred: Points of the prediction.
        truth: Points of the truth, longest bounding box side 1.
        yaws: Starts on the circle.
        threshold: Distance of an inlier.
        search_points: Points of each set while searching.
        final_points: Points of each set for the winner.
        search_iterations: ICP steps of each candidate.
        final_iterations: ICP steps of the winner.
        candidates: Starts that go through ICP.

    Source: One-2-3-45++ section 4.1 (linear search and ICP); MeshFormer A.6 (rotation and scale starts, best inlier ratio).
    """
    few_pred, few_truth = pred.first(search_points), truth.first(search_points)
    turns = sorted((360 * i / yaws for i in range(yaws)), key=lambda degrees: min(degrees, 360 - degrees))
    poses = [np.eye(4)] + [_start(few_pred, few_truth, yaw) for yaw in turns]
    starts = [_match(few_pred, few_truth, pose, threshold)[0] for pose in poses]
    starts = sorted(starts, key=_rank, reverse=True)[:candidates]
    found = [_icp(few_pred, few_truth, start.matrix, threshold, search_iterations) for start in starts]
    many_pred, many_truth = pred.first(final_points), truth.first(final_points)
    found = [_match(many_pred, many_truth, pose.matrix, threshold)[0] for pose in found]
    return _icp(many_pred, many_truth, max(found, key=_rank).matrix, threshold, final_iterations)


def fit_similarity(
    source: np.ndarray,  # [P, 3]
    target: np.ndarray,  # [P, 3]
) -> np.ndarray:
    """The rotation, scale and shift `[4, 4]` that carry paired points closest to their targets.

    Source: Umeyama 1991, equations 40 to 42.
    """
    mean_source, mean_target = source.mean(0), target.mean(0)
    centered = source - mean_source
    u, singular, vt = np.linalg.svd((target - mean_target).T @ centered / len(source))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])  # a rotation, never a mirror
    rotation = (u * signs) @ vt
    scale = (singular * signs).sum() / max((centered**2).sum(1).mean(), 1e-12)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = scale * rotation, mean_target - scale * rotation @ mean_source
    return matrix


def _start(pred: SurfacePoints, truth: SurfacePoints, yaw: float) -> np.ndarray:
    """Turn about +Y by `yaw` degrees, then match the boxes' centres and longest sides; `[4, 4]`."""
    a = math.radians(yaw)
    turn = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    turned = pred.points @ turn.T
    low, high = turned.min(0), turned.max(0)
    true_low, true_high = truth.points.min(0), truth.points.max(0)
    scale = (true_high - true_low).max() / max((high - low).max(), 1e-12)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = scale * turn, (true_low + true_high) / 2 - scale * (low + high) / 2
    return matrix


def _icp(pred: SurfacePoints, truth: SurfacePoints, matrix: np.ndarray, threshold: float, iterations: int) -> Alignment:
    """Iterated closest points with scale; the best pose met on the way."""
    best, source, target = _match(pred, truth, matrix, threshold)
    for _ in range(iterations):
        updated = fit_similarity(source, target)
        change = np.abs(updated - matrix).max()
        matrix = updated
        found, source, target = _match(pred, truth, matrix, threshold)
        best = max(best, found, key=_rank)
        if change < 1e-4:
            break
    return best


def _match(
    pred: SurfacePoints, truth: SurfacePoints, matrix: np.ndarray, threshold: float
) -> tuple[Alignment, np.ndarray, np.ndarray]:
    """How well a pose fits, and the pairs of nearest points: untransformed prediction and truth, `[2P, 3]` each."""
    to_truth, ahead = truth.nearest(pred.transformed(matrix).points)
    # nearest neighbours survive a similarity, so the prediction's own tree serves every pose
    to_pred, back = pred.nearest((truth.points - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T)
    to_pred = to_pred * np.cbrt(np.linalg.det(matrix[:3, :3]))
    inliers = ((to_truth < threshold).mean() + (to_pred < threshold).mean()) / 2
    fit = Alignment(matrix, float(inliers), float(to_truth.mean() + to_pred.mean()) / 2)
    # pairs of both directions: with one alone the scale would shrink towards a point
    source = np.concatenate([pred.points, pred.points[back]])
    return fit, source, np.concatenate([truth.points[ahead], truth.points])


def _rank(alignment: Alignment) -> tuple[float, float]:
    """Inlier ratio, then distance, both rounded: among equals `max` and a stable `sorted` keep the first, the smallest turn."""
    return round(alignment.inliers, 3), -round(alignment.distance, 4)
