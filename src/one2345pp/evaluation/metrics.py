"""Numbers that compare a mesh with the truth: distances between outer surfaces, and differences between pictures.

Alignment lives in `align`, files and tables in `report`. Axes: P points, V views, S pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import trimesh
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from ..errors import InputError
from ..geometry.mesh import normalize_to_sphere
from ..geometry.voxelize import SurfaceCloud


THRESHOLDS = (0.01, 0.02, 0.05, 0.1)  # MeshFormer A.6 reports 0.05
CLOUD_SAMPLES = 120_000  # enough for the flood that finds the outside not to leak between samples
MAX_PSNR = 60.0  # dB; identical pictures would have infinitely many

DEFINITIONS = {
    "f_score@t": "harmonic mean of precision (share of predicted points within t of a true point) and recall (the reverse)",
    "chamfer_l2_mean": "mean unsquared L2 distance to the nearest point of the other set, averaged over the two directions",
    "normal_consistency": "mean absolute cosine between the normals of nearest points, averaged over the two directions",
    "handles": "holes through the prediction: the genus of its surface, summed over its pieces, with open borders taken as filled",
    "mask_iou": "intersection over union of the silhouettes, mean over views",
    "psnr": f"dB over all pixels of unlit sRGB renders on white, mean over views, at most {MAX_PSNR:.0f}",
    "ssim": "structural similarity (Gaussian window, sigma 1.5, data range 1) of the same renders, mean over views and channels",
}


@dataclass(frozen=True)
class SurfacePoints:
    """Points on the outer surface of a mesh, in random order.

    Args:
        points: `[P, 3]`.
        normals: `[P, 3]` unit vectors.
    """

    points: np.ndarray
    normals: np.ndarray

    @classmethod
    def from_mesh(cls, mesh: trimesh.Trimesh, count: int, seed: int = 0) -> SurfacePoints:
        """Sample the surface that can be reached from outside, in the mesh's own frame.

        Args:
            mesh: A mesh of any size and place.
            count: Points wanted. Fewer come back only from a mesh whose surface is nearly all inside.
            seed: Seed of the samples.
        """
        unit = normalize_to_sphere(mesh)
        samples = max(count, CLOUD_SAMPLES)
        cloud = SurfaceCloud.from_mesh(unit, samples, seed)
        if len(cloud.points) < count:  # inner surfaces took the others
            cloud = SurfaceCloud.from_mesh(unit, int(samples * min(1.05 * count / len(cloud.points), 10)), seed)
        chosen = np.random.default_rng(seed).permutation(len(cloud.points))[:count]
        scale = np.ptp(mesh.bounds, axis=0).max() / np.ptp(unit.bounds, axis=0).max()
        return cls(cloud.points[chosen] * scale + mesh.bounds.mean(0), cloud.normals[chosen])

    def __len__(self) -> int:
        return len(self.points)

    def first(self, count: int) -> SurfacePoints:
        """At most `count` of the points."""
        return SurfacePoints(self.points[:count], self.normals[:count])

    def transformed(self, matrix: np.ndarray) -> SurfacePoints:
        """The points under a similarity `[4, 4]`."""
        linear = matrix[:3, :3]
        return SurfacePoints(
            self.points @ linear.T + matrix[:3, 3], self.normals @ linear.T / np.cbrt(np.linalg.det(linear))
        )

    def nearest(
        self,
        queries: np.ndarray,  # [Q, 3]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distance to and index of the nearest point, `[Q]` each."""
        # neighbours asked for in a row find the tree's nodes in the cache: 2.5 times faster
        order = np.lexsort(np.floor(queries * 32).T)
        distances, indices = np.empty(len(queries)), np.empty(len(queries), np.int64)
        distances[order], indices[order] = self._tree.query(queries[order])
        return distances, indices

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.points, balanced_tree=False)


def surface_metrics(
    pred: SurfacePoints, truth: SurfacePoints, thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, float]:
    """Distances between two surfaces, in the units of the points. `DEFINITIONS` says what each number is.

    Args:
        pred: Points of the prediction.
        truth: Points of the truth; by convention its longest bounding box side is 1.
        thresholds: Distances of the F-scores.
    """
    to_truth, at_truth = truth.nearest(pred.points)
    to_pred, at_pred = pred.nearest(truth.points)
    metrics = {}
    for threshold in thresholds:
        precision, recall = (to_truth < threshold).mean(), (to_pred < threshold).mean()
        metrics[f"f_score@{threshold:g}"] = float(2 * precision * recall / max(precision + recall, 1e-12))
    metrics["chamfer_l2_mean"] = float(to_truth.mean() + to_pred.mean()) / 2
    cosines = [
        np.abs((pred.normals * truth.normals[at_truth]).sum(1)).mean(),
        np.abs((truth.normals * pred.normals[at_pred]).sum(1)).mean(),
    ]
    metrics["normal_consistency"] = float(np.mean(cosines))
    return metrics


def handles(mesh: trimesh.Trimesh) -> float:
    """Holes through a mesh, as in a mug's handle; a sieve has many. Vertices that files split are joined first.

    With C pieces, B borders and the Euler number X = V - E + F of the whole, the genus is C - (X + B) / 2.
    """
    joined = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
    joined.update_faces(joined.nondegenerate_faces())
    once = trimesh.grouping.group_rows(joined.edges_sorted, require_count=1)
    borders = trimesh.graph.connected_components(joined.edges_sorted[once]) if len(once) else []
    return float(joined.body_count - (joined.euler_number + len(borders)) / 2)


def image_metrics(
    pred: np.ndarray,  # [V, S, S, 4] uint8
    truth: np.ndarray,  # [V, S, S, 4] uint8
) -> dict[str, float]:
    """Silhouettes and colours of two renders of the same views (straight alpha). `DEFINITIONS` says what each number is."""
    if pred.shape != truth.shape or pred.shape[-1] != 4:
        raise InputError(f"renders: got shapes {pred.shape} and {truth.shape}, expected two of the same [V, S, S, 4].")
    ious, psnrs, ssims = [], [], []
    for a, b in zip(pred, truth, strict=True):
        mask_a, mask_b = a[..., 3] >= 128, b[..., 3] >= 128
        ious.append((mask_a & mask_b).sum() / max((mask_a | mask_b).sum(), 1) if (mask_a | mask_b).any() else 1.0)
        a, b = _on_white(a), _on_white(b)
        psnrs.append(min(-10 * np.log10(max(((a - b) ** 2).mean(), 1e-12)), MAX_PSNR))
        ssims.append(_ssim(a, b))
    return {"mask_iou": float(np.mean(ious)), "psnr": float(np.mean(psnrs)), "ssim": float(np.mean(ssims))}


def _on_white(picture: np.ndarray) -> np.ndarray:
    """`[S, S, 4]` uint8 to `[S, S, 3]` float64 in [0, 1] over white."""
    color, alpha = picture[..., :3] / 255.0, picture[..., 3:] / 255.0
    return color * alpha + 1 - alpha


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of `[S, S, C]` pictures in [0, 1]. Source: Wang et al. 2004, equation 13."""
    c1, c2 = 0.01**2, 0.03**2

    def blur(x):
        return gaussian_filter(x, 1.5, axes=(0, 1), truncate=3.5)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(similarity.mean())
