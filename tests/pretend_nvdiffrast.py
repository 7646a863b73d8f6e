"""A stand-in for nvdiffrast where there is none: what its documentation says of `rasterize`, a face at a time in numpy.

Clip space has y up and its bottom in the first row. A pixel holds (u, v, z/w, face + 1): u and v are the perspective-correct weights
of a face's first and second vertex, the nearest face wins whichever way it is turned, and (0, 0, 0, 0) is empty.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import torch
from pretend_gpu import PretendTensor


class RasterizeCudaContext:
    pass


def rasterize(context, pos, tri, resolution):
    """As `nvdiffrast.torch.rasterize` in instance mode; the derivatives are left out."""
    assert isinstance(context, RasterizeCudaContext)
    assert pos.device.type == tri.device.type == "cuda", "pos and tri must be on the GPU"
    assert pos.dtype == torch.float32 and tri.dtype == torch.int32
    assert pos.ndim == 3 and pos.shape[2] == 4 and pos.is_contiguous()
    corners = pos.cpu().numpy()[:, tri.cpu().numpy()].astype(float)  # [V, F, 3, 4]
    return PretendTensor(torch.from_numpy(np.stack([draw(view, resolution) for view in corners]))), None


def draw(
    corners: np.ndarray,  # [F, 3, 4] in clip space
    resolution: tuple[int, int],
) -> np.ndarray:
    """One view, `[H, W, 4]` float32."""
    height, width = resolution
    y, x = np.meshgrid(
        (np.arange(height) + 0.5) / height * 2 - 1, (np.arange(width) + 0.5) / width * 2 - 1, indexing="ij"
    )
    picture, nearest = np.zeros((height, width, 4), np.float32), np.full((height, width), np.inf)
    for face, (a, b, c) in enumerate(corners):
        # a pixel's ray is u a + v b + (1 - u - v) c up to scale: Cramer's rule with rows (x, y, w)
        weights = np.stack([area(b, c, x, y), area(c, a, x, y), area(a, b, x, y)], -1)
        with np.errstate(divide="ignore", invalid="ignore"):  # faces seen edge-on
            weights = weights / weights.sum(-1, keepdims=True)
            z, w = weights @ np.array([a[2], b[2], c[2]]), weights @ np.array([a[3], b[3], c[3]])
            hit = (weights >= 0).all(-1) & (w > 0) & (np.abs(z / w) <= 1) & (z / w < nearest)
        nearest[hit] = (z / w)[hit]
        picture[hit] = np.stack([weights[..., 0], weights[..., 1], z / w, np.full_like(z, face + 1)], -1)[hit]
    return picture


def area(p: np.ndarray, q: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Twice the signed area of the triangle of two clip-space points and each pixel, times their w."""
    px, py, qx, qy = p[0] - x * p[3], p[1] - y * p[3], q[0] - x * q[3], q[1] - y * q[3]
    return px * qy - py * qx


def install(monkeypatch) -> None:
    """Let `import nvdiffrast.torch` find this."""
    for name in ("nvdiffrast", "nvdiffrast.torch"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.RasterizeCudaContext, module.rasterize = RasterizeCudaContext, rasterize
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["nvdiffrast"].torch = sys.modules["nvdiffrast.torch"]
