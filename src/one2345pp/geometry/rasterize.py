"""Rasterising: which face every pixel of every view sees. Shading lives in `render`.

`embree` casts one ray a pixel on the CPU; `nvdiffrast` rasterises on CUDA. Axes: V views, H W pixels, P rays, F faces.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass

import numpy as np
import trimesh

from ..errors import InputError
from .cameras import CameraRig


logger = logging.getLogger(__name__)


@dataclass
class Fragments:
    """What each pixel sees.

    Args:
        face_ids: `[V, H, W]` int64, -1 where nothing is hit.
        barycentrics: `[V, H, W, 3]` float32 weights of the face's three vertices, 0 where nothing is hit.
        depth: `[V, H, W]` float32 along the optical axis in world units, infinite where nothing is hit.
    """

    face_ids: np.ndarray
    barycentrics: np.ndarray
    depth: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """`[V, H, W]` bool"""
        return self.face_ids >= 0


class EmbreeScene:
    """A mesh ready for ray casting with Embree."""

    def __init__(self, mesh: trimesh.Trimesh):
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene as Scene

        self._scene = Scene()
        vertices = np.ascontiguousarray(mesh.vertices, np.float32)
        # the handle must outlive the scene's queries
        self._mesh = TriangleMesh(self._scene, vertices, np.ascontiguousarray(mesh.faces, np.int32))

    def cast(
        self,
        origins: np.ndarray,  # [P, 3]
        directions: np.ndarray,  # [P, 3]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First hit of every ray.

        Returns:
            Face ids `[P]` (-1 for a miss), barycentrics `[P, 3]`, distances `[P]` in lengths of the direction (infinite for a miss).
        """
        origins, directions = np.ascontiguousarray(origins, np.float32), np.ascontiguousarray(directions, np.float32)
        hit = self._scene.run(origins, directions, output=True)
        missed = hit["geomID"] < 0
        face_ids = np.where(missed, -1, hit["primID"]).astype(np.int64)
        barycentrics = np.stack([1 - hit["u"] - hit["v"], hit["u"], hit["v"]], -1).astype(np.float32)
        barycentrics[missed] = 0
        return face_ids, barycentrics, np.where(missed, np.inf, hit["tfar"]).astype(np.float32)


def rasterize(
    mesh: trimesh.Trimesh, rig: CameraRig, height: int, width: int | None = None, rasterizer: str = "auto"
) -> Fragments:
    """Find the face that every pixel of every view sees.

    Args:
        mesh: Any triangles; nothing is assumed closed.
        rig: `V` cameras.
        height: Pixels.
        width: Pixels, defaults to `height`.
        rasterizer: `"embree"`, `"nvdiffrast"`, or `"auto"` (Embree, which runs everywhere).

    Raises:
        InputError: If there is no such rasteriser, or nvdiffrast is not installed.
    """
    width = width or height
    check_rasterizer(rasterizer)
    return RASTERIZERS[rasterizer](mesh, rig, height, width)


def check_rasterizer(name: str) -> None:
    """Refuse a name that no rasteriser has."""
    if name not in RASTERIZERS:
        raise InputError(f"rasterizer: got {name!r}, expected one of {', '.join(RASTERIZERS)}.")


def _rasterize_embree(mesh: trimesh.Trimesh, rig: CameraRig, height: int, width: int) -> Fragments:
    scene, rig = EmbreeScene(mesh), rig.to("cpu")
    origins, directions = rig.rays(height, width)
    forward = -rig.camera_to_world[:, :3, 2]
    face_ids, barycentrics, depth = [], [], []
    for origin, direction, axis in zip(origins.numpy(), directions.numpy(), forward.numpy(), strict=True):
        flat = direction.reshape(-1, 3)
        ids, weights, distance = scene.cast(origin.reshape(-1, 3), flat)
        face_ids.append(ids.reshape(height, width))
        barycentrics.append(weights.reshape(height, width, 3))
        depth.append((distance * (flat @ axis)).reshape(height, width))
    return Fragments(np.stack(face_ids), np.stack(barycentrics), np.stack(depth))


def _rasterize_nvdiffrast(mesh: trimesh.Trimesh, rig: CameraRig, height: int, width: int) -> Fragments:
    if importlib.util.find_spec("nvdiffrast") is None:
        raise InputError(
            "rasterizer: nvdiffrast is not installed. Install it from its repository, or use rasterizer='embree'."
        )
    import nvdiffrast.torch as dr
    import torch

    _say_licence()

    vertices = torch.as_tensor(np.asarray(mesh.vertices), dtype=torch.float32, device="cuda")
    faces = torch.as_tensor(np.asarray(mesh.faces), dtype=torch.int32, device="cuda")
    rig = rig.to("cuda")
    world_to_camera = rig.world_to_camera
    points = torch.einsum("vij,nj->vni", world_to_camera[:, :3, :3], vertices) + world_to_camera[:, None, :3, 3]
    near, far, scale = 0.01, 100.0, 1 / (rig.tan_half_fov + rig.half_width)[:, None]  # one of them is 0
    z, parallel = points[..., 2], rig.is_orthographic[:, None]
    clip_z = -(far + near) * z - 2 * far * near, -2 * z - (far + near)
    # nvdiffrast's first row is the bottom of clip space, so y is negated to put the top row first
    clip = torch.stack(
        [
            points[..., 0] * scale,
            -points[..., 1] * scale,
            torch.where(parallel, clip_z[1], clip_z[0]) / (far - near),
            torch.where(parallel, 1.0, -z),
        ],
        -1,
    )
    out, _ = dr.rasterize(dr.RasterizeCudaContext(), clip.contiguous(), faces, (height, width))
    face_ids = out[..., 3].long() - 1
    weights = torch.stack([out[..., 0], out[..., 1], 1 - out[..., 0] - out[..., 1]], -1)
    hit = face_ids >= 0
    corner_depth = -z[torch.arange(len(z), device="cuda")[:, None, None, None], faces.long()[face_ids.clamp(min=0)]]
    depth = torch.where(hit, (weights * corner_depth).sum(-1), torch.inf)
    return Fragments(face_ids.cpu().numpy(), (weights * hit[..., None]).cpu().numpy(), depth.cpu().numpy())


@functools.cache  # at first use
def _say_licence() -> None:
    logger.warning(
        "nvdiffrast: NVIDIA licenses it for research and evaluation only. For other uses take rasterizer='embree'."
    )


RASTERIZERS = {"auto": _rasterize_embree, "embree": _rasterize_embree, "nvdiffrast": _rasterize_nvdiffrast}
