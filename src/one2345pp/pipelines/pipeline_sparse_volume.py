"""Stage 2: views and cameras to a sparse volume and its mesh, by a dense and a sparse diffusion. Networks live in `models`.

Axes: B samples, V views, N active voxels, X Y Z grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.extract import volume_to_mesh
from ..geometry.views import Views
from ..geometry.volume import SparseVolume
from ..models.condition_encoder import ConditionEncoder, patch_features, project_pixels
from ..models.global_vector import global_vector
from ..models.sparse import SparseGrid
from ..models.unet_occupancy import OccupancyUNet3DModel
from ..models.unet_sparse import SparseUNet3DModel
from ..models.view_batch import ViewBatch
from .callbacks import end_step, tensor_names
from .hub import SelfContainedMixin
from .picture.isolate import cut_out_views
from .pipeline_output import SparseVolumePipelineOutput
from .roles import Solid
from .stages import StageMixin, register_arguments
from .volume.checks import check_inputs, check_maps, check_vector_width
from .volume.denoising import check_prediction_type, denoise, guided


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from one2345pp import One2345PlusPlusPipeline, Views, default_checkpoint

        >>> pipe = One2345PlusPlusPipeline.from_pretrained(default_checkpoint()).volume
        >>> pipe(Views.load("mug")).meshes[0].export("mug.ply")  # a folder with cameras.json
        ```
"""


class SparseVolumeDiffusionPipeline(StageMixin, SelfContainedMixin, DiffusionPipeline):
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
        vision_encoder ([`CLIPVisionModelWithProjection`], *optional*): Gives the global vector of the input image, as wide as
            the networks take it.
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
        unets = {"occupancy_unet": occupancy_unet, "sparse_unet": sparse_unet, "fine_unet": fine_unet}
        check_vector_width(vision_encoder, **unets)
        register_arguments(self, locals())

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    # --- the role of a stage ------------------------------------------------------------------------------------

    def reconstruct(
        self, views: Views, *, image: Image.Image | None = None, generator: torch.Generator | None = None, **options
    ) -> Solid:
        """The volume of one object's views, and with it its surface; options as those of a call."""
        return Solid(volume=self(views, image=image, generator=generator, output_type="volume", **options).volumes[0])

    # --- steps of a call, in order ------------------------------------------------------------------------------

    def check_inputs(
        self, *, views: list[Views], maps=None, **inputs
    ) -> tuple[list[Image.Image] | None, list[dict[str, list[Image.Image]]]]:
        """Input images and maps as lists with one entry a sample; raises `InputError` for what the call could not use, see
        `volume.checks`."""
        check_prediction_type(self.occupancy_scheduler, self.sparse_scheduler)
        encoders = (self.occupancy_condition, self.sparse_condition, self.fine_condition)
        return check_inputs(views=views, **inputs), check_maps(maps, views, encoders)

    def prepare_views(
        self, views: list[Views], condition: ConditionEncoder, maps: Sequence[Mapping[str, list[Image.Image]]] = ()
    ) -> ViewBatch:
        """Square `RGBA` views as a batch for a condition encoder, with the maps that it takes."""
        names = condition.config.maps or {}
        own = [{name: given[name] for name in names} for given in maps] if names else None
        pictures, rigs = [list(sample) for sample in views], [sample.rig for sample in views]
        batch = ViewBatch.from_pictures(pictures, rigs, condition.config.image_size, own).to(self._execution_device)
        if self.patch_encoder is not None and condition.config.patch_channels:
            batch.patches = patch_features(self.patch_encoder, batch.images)
        return batch

    def encode_image(self, images: list[Image.Image] | None, batch_size: int) -> Tensor | None:
        """Global vectors of the input images, `[B, G]`: zero without images, `None` without an encoder."""
        unet = self.occupancy_unet
        channels = unet.config.global_channels
        if not channels or self.vision_encoder is None or self.feature_extractor_clip is None:
            return None
        if images is None:
            return torch.zeros(batch_size, channels, device=self._execution_device, dtype=unet.dtype)
        return global_vector(self.vision_encoder, self.feature_extractor_clip, images, self._execution_device).to(
            unet.dtype
        )

    def denoise_occupancy(
        self, views: ViewBatch, vector: Tensor | None, num_steps: int, generator=None, on_step: Callable | None = None
    ) -> Tensor:
        """Draw the shell occupancy, `[B, 1, X, Y, Z]`, about -1 (empty) to 1 (shell)."""
        unet, condition = self.occupancy_unet, self.occupancy_condition(views)
        previous = None

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            nonlocal previous
            feedback = previous if unet.config.self_conditioning else None

            def network(levels, vector, _):
                return unet(sample, timestep, levels, vector, feedback).sample

            previous = guided(network, self.guidance_scale, condition, vector)
            return previous

        shape = (len(views), unet.config.in_channels, *[unet.config.sample_size] * 3)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=unet.dtype)
        return self._denoise(self.occupancy_scheduler, noise, [1] * len(views), predict, num_steps, generator, on_step)

    def denoise_sparse(
        self,
        grid: SparseGrid,
        views: ViewBatch,
        vector: Tensor | None,
        num_steps: int,
        generator=None,
        on_step: Callable | None = None,
        fine: bool = False,
    ) -> Tensor:
        """Draw signed distance (in truncation distances) and colour (in [-1, 1]) on the voxels, `[N, 4]`."""
        unet = self.fine_unet if fine else self.sparse_unet
        condition = (self.fine_condition if fine else self.sparse_condition)(views, grid)
        pixels = project_pixels(views, grid) if unet.config.pixel_channels else None

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            def network(levels, vector, pixels):
                return unet(sample, timestep, grid, levels, vector, pixels).sample

            return guided(network, self.guidance_scale, condition, vector, pixels).clamp(-1, 1)

        counts = grid.counts.tolist()
        generators = generator if isinstance(generator, list) else [generator] * len(counts)
        noise = [
            randn_tensor((count, unet.config.in_channels), generator=one, device=grid.device, dtype=unet.dtype)
            for count, one in zip(counts, generators, strict=True)
        ]
        return self._denoise(self.sparse_scheduler, torch.cat(noise), counts, predict, num_steps, generator, on_step)

    def _denoise(self, *args) -> Tensor:
        return denoise(*args, lambda: self.interrupt, self.progress_bar)

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
        views: Views | list[Image.Image] | list[Views] | list[list[Image.Image]],
        cameras: CameraRig | str | list[CameraRig | str] | None = None,
        image: Image.Image | list[Image.Image] | None = None,
        maps: dict[str, list[Image.Image]] | list[dict[str, list[Image.Image]]] | None = None,
        num_occupancy_steps: int | None = None,
        num_sparse_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "mesh",
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        return_dict: bool = True,
    ) -> SparseVolumePipelineOutput | tuple:
        r"""Reconstruct objects from views.

        Args:
            views ([`Views`], `list[PIL.Image.Image]`, or a list of those): Views of each object, RGBA, or RGB on a plain background.
            cameras ([`CameraRig`], `str`, or a list, *optional*): Cameras of views that are lists; those of the rig
                `"zero123plus-v1.2"` by default.
            image (`PIL.Image.Image` or a list, *optional*): The input image, for the global vector.
            maps (`dict` or a list of those, *optional*): Extra maps of the views by name, a picture a view, for condition encoders
                that take them: `{"normals": [...]}`, camera-space normals as `(n + 1) / 2`.
            num_occupancy_steps, num_sparse_steps (`int`, *optional*): Steps of the two diffusions; `fine_unet` takes the latter.
            guidance_scale (`float`, *optional*): Classifier-free guidance; 1 and less is without.
            generator (`torch.Generator` or a list, *optional*): Source of every random draw; a list has one a sample, which then
                does not depend on the others.
            output_type (`str`, *optional*, defaults to `"mesh"`): `"mesh"`, `"volume"`, `"pt"` (dense volumes
                `[B, 4, X, Y, Z]`) or `"latent"` (the occupancy alone).
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, {"latents": ...})` after every
                step of both diffusions; steps are counted through. If it sets `_interrupt` of the pipeline, each diffusion ends
                with its last prediction, after one step at least.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): What it is given, see `callbacks.tensor_names`.
            return_dict (`bool`, *optional*, defaults to `True`): Return an output class instead of a tuple.

        Examples:

        Returns:
            [`SparseVolumePipelineOutput`]

        Raises:
            InputError: If the views and cameras do not fit each other, or no surface is found.
        """
        # 1. Check inputs
        names = tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        views = Views.batch(views, cameras)
        images, maps = self.check_inputs(
            views=views,
            image=image,
            maps=maps,
            num_occupancy_steps=num_occupancy_steps,
            num_sparse_steps=num_sparse_steps,
            generator=generator,
            output_type=output_type,
        )
        config = self.config
        if num_occupancy_steps is None:
            num_occupancy_steps = config.default_num_occupancy_steps
        num_sparse_steps = config.default_num_sparse_steps if num_sparse_steps is None else num_sparse_steps
        self._guidance_scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._interrupt, numbers = False, itertools.count()

        def on_step(timestep: Tensor, latents: Tensor) -> Tensor:
            tensors = {"latents": latents}
            return end_step(self, callback_on_step_end, names, next(numbers), timestep, tensors)["latents"]

        # 2. Encode the conditions, once a sample
        views = [cut_out_views(one) for one in views]
        vector = self.encode_image(images, len(views))
        prepared: dict[tuple, ViewBatch] = {}  # encoders that take the same views share them and their patches

        def shown(condition: ConditionEncoder) -> ViewBatch:
            config = condition.config
            key = (config.image_size, str(config.maps), bool(config.patch_channels))
            if key not in prepared:
                prepared[key] = self.prepare_views(views, condition, maps)
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
