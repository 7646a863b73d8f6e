"""Stage 2: views and cameras to a sparse volume and its mesh, by a dense and a sparse diffusion. Networks live in `models`.

Axes: B samples, V views, N active voxels, X Y Z grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import replace_example_docstring
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.extract import volume_to_mesh
from ..geometry.volume import SparseVolume
from ..models.condition_encoder import ConditionEncoder, ViewBatch, patch_features
from ..models.sparse import SparseGrid
from ..models.unet_occupancy import OccupancyUNet3DModel
from ..models.unet_sparse import SparseUNet3DModel
from .hub import SelfContainedMixin
from .multiview_inputs import check_generators, check_tensor_inputs
from .pipeline_multiview_tile import composite_on_grey
from .pipeline_output import SparseVolumePipelineOutput
from .volume_denoising import VolumeDenoisingMixin
from .volume_inputs import RGBA, check_kinds, check_normals, check_views, encoder_views


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from one2345pp import One2345PlusPlusPipeline, default_checkpoint
        >>> from one2345pp.pipelines.preprocess import load_views

        >>> pipe = One2345PlusPlusPipeline.from_pretrained(default_checkpoint()).volume
        >>> views, rig = load_views("views/")  # a folder with cameras.json
        >>> pipe(views, cameras=rig).meshes[0].export("object.ply")
        ```
"""


class SparseVolumeDiffusionPipeline(VolumeDenoisingMixin, SelfContainedMixin, DiffusionPipeline):
    r"""Views of one object to its signed distance and colour (One-2-3-45++ section 3.2).

    First a dense diffusion draws which coarse cells hold surface; each is subdivided into eight, and a sparse diffusion draws
    signed distance and colour on those. Both predict the clean sample (`prediction_type="sample"`) and see the views through
    their condition encoders. Beyond the paper, `fine_unet` subdivides what is near the surface once more.

    Args:
        occupancy_condition ([`ConditionEncoder`]): Dense condition pyramid of the first diffusion.
        occupancy_unet ([`OccupancyUNet3DModel`]): Its network.
        occupancy_scheduler ([`SchedulerMixin`]): Its scheduler, [`LogSNRScheduler`] or a stock one of diffusers.
        sparse_condition ([`ConditionEncoder`]): Sparse condition pyramid of the second diffusion.
        sparse_unet ([`SparseUNet3DModel`]): Its network.
        sparse_scheduler ([`SchedulerMixin`]): Its scheduler.
        vision_encoder ([`CLIPVisionModelWithProjection`], *optional*): Gives the global vector of the input image.
        feature_extractor_clip ([`CLIPImageProcessor`], *optional*): Prepares the input image for it.
        patch_encoder ([`Dinov2Model`], *optional*): Patch features of the views, for encoders that were trained with them.
        fine_condition ([`ConditionEncoder`], *optional*), fine_unet ([`SparseUNet3DModel`], *optional*): The same as
            `sparse_condition` and `sparse_unet` at twice the resolution, on the children of the voxels near the surface.
        truncation (`float`): Largest signed distance of the volume, in world units; half of it after `fine_unet`.
        occupancy_level (`float`): Cells above it are subdivided; below 0 surfaces get fewer holes, for more voxels. Without effect
            where a sign step has made all cells -1 or 1.
        fine_level (`float`): Voxels nearer to the surface are subdivided for `fine_unet`, in truncation distances.
        surface_level (`float`): Predicted distance, in truncation distances, that is taken for the surface; above 0 what is drawn
            gets thicker, which weights that draw too thin need.
        max_voxels (`int`): A call with more active voxels is refused before they are denoised.
        default_num_occupancy_steps, default_num_sparse_steps (`int`), default_guidance_scale (`float`): What a call uses that
            does not say.
    """

    model_cpu_offload_seq = (
        "vision_encoder->patch_encoder->occupancy_condition->occupancy_unet->sparse_condition->sparse_unet"
        "->fine_condition->fine_unet"
    )
    _optional_components = ["vision_encoder", "feature_extractor_clip", "patch_encoder", "fine_condition", "fine_unet"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        occupancy_condition: ConditionEncoder,
        occupancy_unet: OccupancyUNet3DModel,
        occupancy_scheduler: SchedulerMixin,
        sparse_condition: ConditionEncoder,
        sparse_unet: SparseUNet3DModel,
        sparse_scheduler: SchedulerMixin,
        vision_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor_clip: CLIPImageProcessor | None = None,
        patch_encoder: Dinov2Model | None = None,
        fine_condition: ConditionEncoder | None = None,
        fine_unet: SparseUNet3DModel | None = None,
        truncation: float = 0.025,
        occupancy_level: float = 0.0,
        fine_level: float = 0.4,
        surface_level: float = 0.0,
        max_voxels: int = 1_000_000,
        default_num_occupancy_steps: int = 50,
        default_num_sparse_steps: int = 20,
        default_guidance_scale: float = 1.0,
    ):
        super().__init__()
        self.register_modules(
            occupancy_condition=occupancy_condition,
            occupancy_unet=occupancy_unet,
            occupancy_scheduler=occupancy_scheduler,
            sparse_condition=sparse_condition,
            sparse_unet=sparse_unet,
            sparse_scheduler=sparse_scheduler,
            vision_encoder=vision_encoder,
            feature_extractor_clip=feature_extractor_clip,
            patch_encoder=patch_encoder,
            fine_condition=fine_condition,
            fine_unet=fine_unet,
        )
        self.register_to_config(
            truncation=truncation,
            occupancy_level=occupancy_level,
            fine_level=fine_level,
            surface_level=surface_level,
            max_voxels=max_voxels,
            default_num_occupancy_steps=default_num_occupancy_steps,
            default_num_sparse_steps=default_num_sparse_steps,
            default_guidance_scale=default_guidance_scale,
        )

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # --- steps of a call, in order ------------------------------------------------------------------------------

    def check_inputs(
        self,
        views,
        cameras,
        image,
        normals,
        generator,
        output_type: str,
        steps: tuple[int, int],
        tensor_inputs: list[str],
    ) -> tuple[list[list[Image.Image]], list[CameraRig], list[Image.Image] | None, list[list[Image.Image]] | None]:
        """Views, rigs, input images and normals as lists with one entry a sample; raise `InputError` for what cannot be used."""
        if output_type not in ("mesh", "volume", "pt", "latent"):
            raise InputError(f"output_type: got {output_type!r}, expected 'mesh', 'volume', 'pt' or 'latent'.")
        if min(steps) < 1:
            raise InputError(f"num_occupancy_steps, num_sparse_steps: got {steps}, expected at least 1 each.")
        check_tensor_inputs(tensor_inputs, self._callback_tensor_inputs)
        batch, rigs = check_views(views, cameras)
        images = None if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        if images is not None and len(images) != len(batch):
            raise InputError(f"image: got {len(images)} input images for {len(batch)} samples.")
        check_generators(generator, len(batch), "a sample")
        encoders = (self.occupancy_condition, self.sparse_condition, self.fine_condition)
        needed = any(encoder is not None and encoder.config.view_channels > RGBA for encoder in encoders)
        return batch, rigs, images, check_normals(normals, batch, needed)

    def prepare_views(
        self,
        views: list[list[Image.Image]],
        rigs: list[CameraRig],
        condition: ConditionEncoder,
        normals: list[list[Image.Image]] | None = None,
        kinds: list[list[str]] | None = None,
    ) -> ViewBatch:
        """Views as a batch for a condition encoder. RGB views are cut out of their plain background."""
        size, channels = condition.config.image_size, condition.config.view_channels
        normals = normals if channels > RGBA else None
        batch = encoder_views(views, rigs, size, normals, kinds).to(self._execution_device)
        if self.patch_encoder is not None and condition.config.patch_channels:
            batch.patches = patch_features(self.patch_encoder, batch.images)
        return batch

    def encode_image(self, images: list[Image.Image] | None, batch_size: int) -> Tensor | None:
        """Global vectors of the input images, `[B, G]`: zero without images, `None` without an encoder."""
        channels = self.occupancy_unet.config.global_channels
        if not channels or self.vision_encoder is None or self.feature_extractor_clip is None:
            return None
        device = self._execution_device
        if images is None:
            return torch.zeros(batch_size, channels, device=device, dtype=self.occupancy_unet.dtype)
        pictures = [composite_on_grey(picture) for picture in images]
        pixels = self.feature_extractor_clip(images=pictures, return_tensors="pt").pixel_values
        embeds = self.vision_encoder(pixels.to(device, self.vision_encoder.dtype)).image_embeds
        return F.normalize(embeds.float(), dim=-1).to(self.occupancy_unet.dtype) * embeds.shape[-1] ** 0.5

    def subdivide(
        self,
        occupancy: Tensor,  # [B, 1, x, y, z]
    ) -> SparseGrid:
        """The eight children of every occupied cell."""
        occupied = occupancy[:, 0] > self.config.occupancy_level
        return self.children(SparseGrid(occupied.nonzero(), occupied.shape[-1], len(occupied)))

    def children(self, grid: SparseGrid) -> SparseGrid:
        """The eight children of every voxel of `grid`; refused where a sample has none, or they are more than `max_voxels`."""
        for index, found in enumerate(grid.counts.tolist()):
            if not found:
                raise InputError(
                    f"views: no surface was found in sample {index}. Check that the views show one object, that their masks "
                    "are not empty, and that the cameras look at the origin."
                )
        count, most = 8 * len(grid), self.config.max_voxels
        if count > most:
            raise InputError(
                f"views: their surface has {count:,} active voxels at {2 * grid.resolution}^3, more than max_voxels, {most:,}. "
                "Raise max_voxels if there is memory (docs/performance.md says how much), pass fewer objects at once, "
                "or raise occupancy_level."
            )
        return grid.subdivided()

    def to_volumes(
        self,
        grid: SparseGrid,
        sample: Tensor,  # [N, 4]
    ) -> list[SparseVolume]:
        """The denoised sample as one volume an object, on the CPU; twice as fine a grid has half the truncation."""
        sample, coords, index = sample.float().cpu().clamp(-1, 1), grid.coords.cpu(), grid.sample_index.cpu()
        distance = (sample[:, 0] - self.config.surface_level).clamp(-1, 1)
        coarse = 2 * self.occupancy_unet.config.sample_size
        truncation = self.config.truncation * coarse / grid.resolution
        return [
            SparseVolume(
                coords[index == b, 1:],
                distance[index == b] * truncation,
                (sample[index == b, 1:] + 1) / 2,
                grid.resolution,
                truncation,
            )
            for b in range(grid.batch_size)
        ]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        views: list[Image.Image] | list[list[Image.Image]],
        cameras: CameraRig | str | list[CameraRig | str] = "zero123plus-v1.2",
        image: Image.Image | list[Image.Image] | None = None,
        num_occupancy_steps: int | None = None,
        num_sparse_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "mesh",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, the form of diffusers
        normals: list[Image.Image] | list[list[Image.Image]] | None = None,
        kinds: list[str] | list[list[str]] | None = None,
    ) -> SparseVolumePipelineOutput | tuple:
        r"""Reconstruct objects from views.

        Args:
            views (`list[PIL.Image.Image]` or a list of those): Views of each object, RGBA, or RGB on a plain background.
            cameras ([`CameraRig`], `str`, or a list, *optional*, defaults to `"zero123plus-v1.2"`): Their cameras.
            image (`PIL.Image.Image` or a list, *optional*): The input image, for the global vector.
            num_occupancy_steps, num_sparse_steps (`int`, *optional*): Steps of the two diffusions; `fine_unet` takes the latter.
            guidance_scale (`float`, *optional*): Classifier-free guidance; 1 and less is without.
            generator (`torch.Generator` or a list, *optional*): Source of every random draw; a list has one a sample, which then
                does not depend on the others.
            output_type (`str`, *optional*, defaults to `"mesh"`): `"mesh"`, `"volume"`, `"pt"` (dense volumes
                `[B, 4, X, Y, Z]`) or `"latent"` (the occupancy alone).
            return_dict (`bool`, *optional*, defaults to `True`): Return an output class instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, {"latents": ...})` after every
                step of both diffusions; steps are counted through. If it sets `_interrupt` of the pipeline, each diffusion ends
                with its last prediction, after one step at least.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): What it is given.
            normals (`list[PIL.Image.Image]` or a list of those, *optional*): Camera-space normals of the views as `(n + 1) / 2`, for
                condition encoders that take them (`view_channels=7`).
            kinds (`list[str]` or a list of those, *optional*): What each view is, `"given"` (all, by default), `"drawn"` by a first
                stage or the `"picture"` that it drew them of, for condition encoders that are told (`view_kinds`).

        Examples:

        Returns:
            [`SparseVolumePipelineOutput`]

        Raises:
            InputError: If the views and cameras do not fit each other, or no surface is found.
        """
        # 1. Check inputs
        num_occupancy_steps = (
            self.config.default_num_occupancy_steps if num_occupancy_steps is None else num_occupancy_steps
        )
        num_sparse_steps = self.config.default_num_sparse_steps if num_sparse_steps is None else num_sparse_steps
        steps, tensor_inputs = (num_occupancy_steps, num_sparse_steps), callback_on_step_end_tensor_inputs
        views, rigs, images, normals = self.check_inputs(
            views, cameras, image, normals, generator, output_type, steps, tensor_inputs
        )
        kinds = check_kinds(kinds, views)
        self._guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._interrupt = False
        count = 0

        def on_step(timestep: Tensor, latents: Tensor) -> Tensor:
            nonlocal count
            given = callback_on_step_end(self, count, timestep, {"latents": latents} if tensor_inputs else {})
            count += 1
            return (given or {}).get("latents", latents)

        on_step = None if callback_on_step_end is None else on_step

        # 2. Encode the conditions, once a sample
        vector = self.encode_image(images, len(views))
        prepared: dict[tuple, ViewBatch] = {}  # encoders that take the same views share them and their patches

        def shown(condition: ConditionEncoder) -> ViewBatch:
            config = condition.config
            key = (config.image_size, config.view_channels, bool(config.patch_channels))
            if key not in prepared:
                prepared[key] = self.prepare_views(views, rigs, condition, normals, kinds)
            return prepared[key]

        # 3. Denoise the occupancy
        seen = shown(self.occupancy_condition)
        occupancy = self.denoise_occupancy(seen, vector, num_occupancy_steps, generator, on_step)
        if output_type == "latent":
            self.maybe_free_model_hooks()
            return SparseVolumePipelineOutput(occupancy) if return_dict else (occupancy,)

        # 4. Subdivide what is occupied
        grid = self.subdivide(occupancy)

        # 5. Denoise signed distance and colour
        seen = shown(self.sparse_condition)
        sample = self.denoise_sparse(grid, seen, vector, num_sparse_steps, generator, on_step)

        # 6. The same once more, twice as fine, where the surface is
        if self.fine_unet is not None:
            grid = self.children(grid.where(sample[:, 0].abs() < self.config.fine_level))
            seen = shown(self.fine_condition)
            sample = self.denoise_sparse(grid, seen, vector, num_sparse_steps, generator, on_step, fine=True)

        # 7. Volumes and meshes
        volumes = self.to_volumes(grid, sample)
        self.maybe_free_model_hooks()
        meshes = [volume_to_mesh(volume) for volume in volumes] if output_type == "mesh" else None
        if output_type == "pt":
            volumes = torch.stack([volume.dense() for volume in volumes])
        return SparseVolumePipelineOutput(volumes, meshes) if return_dict else (volumes, meshes)
