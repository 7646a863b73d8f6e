"""What each pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusers.utils import BaseOutput


if TYPE_CHECKING:
    import numpy as np
    import torch
    import trimesh
    from PIL.Image import Image

    from ..geometry.views import Views
    from ..geometry.volume import SparseVolume
    from .picture.guide import Candidate, PictureGuide


@dataclass
class MultiViewTilePipelineOutput(BaseOutput):
    """Tiles and the views cut from them.

    Args:
        images: `B` tiles, as `output_type` says (PIL list, NHWC array, NCHW tensor or latents).
        views: For each tile its six views: of PIL tiles `B` `Views`, pictures with their cameras; of arrays and tensors one of them
            with a views axis, `[B, 6, h, w, 3]` or `[B, 6, 3, h, w]`; `None` of latents.
    """

    images: list[Image] | np.ndarray | torch.Tensor
    views: list[Views] | np.ndarray | torch.Tensor | None = None


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
        views: For each object, pictures and their cameras, RGBA.
        volumes: The sparse volumes, `None` for an object whose reconstructor makes none.
        coarse_meshes: The meshes before refinement.
        elevations: Degrees above the horizon from which each picture looks, told or estimated; `None` where that is not known.
    """

    meshes: list[trimesh.Trimesh]
    views: list[Views]
    volumes: list[SparseVolume | None]
    coarse_meshes: list[trimesh.Trimesh]
    elevations: list[float | None]

    @classmethod
    def of(
        cls, meshes: list[trimesh.Trimesh], kept: list[Candidate], guides: list[PictureGuide | None]
    ) -> One2345PlusPlusPipelineOutput:
        """Finished meshes, what they were made of, and what their pictures say."""
        return cls(
            meshes=meshes,
            views=[one.views for one in kept],
            volumes=[one.solid.volume for one in kept],
            coarse_meshes=[one.solid.mesh for one in kept],
            elevations=[None if guide is None else guide.elevation for guide in guides],
        )
