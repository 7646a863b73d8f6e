"""What each pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers.utils import BaseOutput


if TYPE_CHECKING:
    import numpy as np
    import torch
    import trimesh
    from PIL.Image import Image

    from ..geometry.volume import SparseVolume


@dataclass
class MultiViewTilePipelineOutput(BaseOutput):
    """Tiles and the views cut from them.

    Args:
        images: `B` tiles, as `output_type` says (PIL list, NHWC array, NCHW tensor or latents).
        views: For each tile its six views in the rig's order (PIL list, or arrays/tensors with a views axis), `None` for latents.
    """

    images: list[Image] | np.ndarray | torch.Tensor
    views: Any = None


@dataclass
class SparseVolumePipelineOutput(BaseOutput):
    """Volumes, and their meshes when asked for.

    Args:
        volumes: `B` sparse volumes; for `output_type="pt"` one dense tensor `[B, 4, X, Y, Z]`; for `"latent"` the occupancy
            `[B, 1, x, y, z]` in [-1, 1] that the first stage drew.
        meshes: `B` meshes with vertex colours, `None` unless `output_type="mesh"`.
    """

    volumes: list[SparseVolume] | torch.Tensor
    meshes: list[trimesh.Trimesh] | None = None


@dataclass
class TextureRefinementPipelineOutput(BaseOutput):
    """Args:
    meshes: Meshes with UVs and a base colour texture.
    """

    meshes: list[trimesh.Trimesh]


@dataclass
class One2345PlusPlusPipelineOutput(BaseOutput):
    """Everything the chain made, one entry an image.

    Args:
        meshes: Textured meshes.
        views: For each image, its six views as RGBA PIL images.
        volumes: The sparse volumes.
        coarse_meshes: The meshes with vertex colours, before refinement.
    """

    meshes: list[trimesh.Trimesh]
    views: list[list[Image]]
    volumes: list[SparseVolume]
    coarse_meshes: list[trimesh.Trimesh]
