"""The chain: one image or prompt to a textured mesh. What each stage does lives in the stage's own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, MultiControlNetModel, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.extract import finish_mesh
from ..geometry.framing import frame_object
from ..geometry.picture_fit import stretch
from ..models.condition_encoder import ConditionEncoder
from ..models.elevation import ElevationEstimator
from ..models.unet_occupancy import OccupancyUNet3DModel
from ..models.unet_sparse import SparseUNet3DModel
from .candidates import reconstruct_best
from .chain_inputs import as_list, check_call
from .elevations import find_elevations
from .hub import SelfContainedMixin
from .pipeline_multiview_tile import MultiViewTilePipeline
from .pipeline_output import One2345PlusPlusPipelineOutput
from .pipeline_sparse_volume import SparseVolumeDiffusionPipeline
from .pipeline_texture_refinement import TextureRefinementPipeline
from .preprocess import isolate_object


MULTIVIEW_COMPONENTS = (
    "vae",
    "text_encoder",
    "tokenizer",
    "unet",
    "scheduler",
    "vision_encoder",
    "feature_extractor_clip",
    "feature_extractor_vae",
    "controlnet",
)
PICTURE_TRUST = 8.0  # of the input picture in the texture, against 1 of a drawn view
VOLUME_COMPONENTS = (
    "occupancy_condition",
    "occupancy_unet",
    "occupancy_scheduler",
    "sparse_condition",
    "sparse_unet",
    "sparse_scheduler",
    "vision_encoder",
    "feature_extractor_clip",
    "patch_encoder",
    "fine_condition",
    "fine_unet",
)


class One2345PlusPlusPipeline(SelfContainedMixin, DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    r"""Image or prompt to a textured mesh, the whole of One-2-3-45++.

    The components of the stages lie flat beside each other. The stages themselves, `multiview`, `volume` and `texture`, are
    built from the current components whenever they are asked for, so a scheduler or model that is swapped here is used at once.
    LoRA weights are those of the views' UNet and text encoder.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, vision_encoder, feature_extractor_clip, feature_extractor_vae:
            Components of [`MultiViewTilePipeline`]. The vision encoder also serves the volume stage.
        occupancy_condition, occupancy_unet, occupancy_scheduler, sparse_condition, sparse_unet, sparse_scheduler:
            Components of [`SparseVolumeDiffusionPipeline`].
        controlnet ([`ControlNetModel`], [`MultiControlNetModel`] or a list, *optional*): Steers the views by control pictures.
        patch_encoder (*optional*): Image features for the volume stage, if its weights were trained with them.
        fine_condition ([`ConditionEncoder`], *optional*), fine_unet ([`SparseUNet3DModel`], *optional*): Its third network.
        elevation_estimator ([`ElevationEstimator`], *optional*): Says from how high an image looks, where a call does not.
        multiview_config, volume_config, texture_config (`dict`, *optional*): The scalar arguments of the stages.
        drawn_volume_config (`dict`, *optional*): Those of the volume stage that are others when its views are drawn and not given:
            views that do not quite agree may need a thicker surface or a wider support.
        default_num_candidates (`int`): Candidates of a call that does not say.
        tell_kinds (`bool`): Whether the volume stage is told that its views are drawn, and which is the picture: for weights that
            learnt with the views of this first stage. One that draws like true views does better without.
        believe_picture (`bool`): Whether a picture of known elevation is one more view of the volume stage, and the volume takes its
            outline (`geometry.outline`). How large it is beside the views is a guess: views like true ones do better without.
    """

    model_cpu_offload_seq = (
        "elevation_estimator->text_encoder->vision_encoder->unet->vae->patch_encoder"
        "->occupancy_condition->occupancy_unet->sparse_condition->sparse_unet->fine_condition->fine_unet"
    )
    _optional_components = ["controlnet", "patch_encoder", "fine_condition", "fine_unet", "elevation_estimator"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        vision_encoder: CLIPVisionModelWithProjection,
        feature_extractor_clip: CLIPImageProcessor,
        feature_extractor_vae: CLIPImageProcessor,
        occupancy_condition: ConditionEncoder,
        occupancy_unet: OccupancyUNet3DModel,
        occupancy_scheduler: KarrasDiffusionSchedulers,
        sparse_condition: ConditionEncoder,
        sparse_unet: SparseUNet3DModel,
        sparse_scheduler: KarrasDiffusionSchedulers,
        controlnet: ControlNetModel | MultiControlNetModel | list | tuple | None = None,
        patch_encoder: torch.nn.Module | None = None,
        fine_condition: ConditionEncoder | None = None,
        fine_unet: SparseUNet3DModel | None = None,
        elevation_estimator: ElevationEstimator | None = None,
        multiview_config: dict | None = None,
        volume_config: dict | None = None,
        texture_config: dict | None = None,
        drawn_volume_config: dict | None = None,
        default_num_candidates: int = 1,
        tell_kinds: bool = False,
        believe_picture: bool = False,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            vision_encoder=vision_encoder,
            feature_extractor_clip=feature_extractor_clip,
            feature_extractor_vae=feature_extractor_vae,
            occupancy_condition=occupancy_condition,
            occupancy_unet=occupancy_unet,
            occupancy_scheduler=occupancy_scheduler,
            sparse_condition=sparse_condition,
            sparse_unet=sparse_unet,
            sparse_scheduler=sparse_scheduler,
            controlnet=MultiControlNetModel(controlnet) if isinstance(controlnet, list | tuple) else controlnet,
            patch_encoder=patch_encoder,
            fine_condition=fine_condition,
            fine_unet=fine_unet,
            elevation_estimator=elevation_estimator,
        )
        self.register_to_config(
            multiview_config=dict(multiview_config or {}),
            volume_config=dict(volume_config or {}),
            texture_config=dict(texture_config or {}),
            drawn_volume_config=dict(drawn_volume_config or {}),
            default_num_candidates=default_num_candidates,
            tell_kinds=tell_kinds,
            believe_picture=believe_picture,
        )

    # --- stages -------------------------------------------------------------------------------------------------

    @classmethod
    def from_stages(
        cls,
        multiview: MultiViewTilePipeline,
        volume: SparseVolumeDiffusionPipeline,
        texture: TextureRefinementPipeline | None = None,
        drawn_volume_config: dict | None = None,
        default_num_candidates: int = 1,
        elevation_estimator: ElevationEstimator | None = None,
        tell_kinds: bool = False,
        believe_picture: bool = False,
    ) -> One2345PlusPlusPipeline:
        """A chain that shares the components of its stages. Both image stages use the vision encoder of `multiview`."""
        texture = TextureRefinementPipeline() if texture is None else texture
        if unknown := set(drawn_volume_config or {}) - set(_scalars(volume)):
            known = ", ".join(sorted(_scalars(volume)))
            raise InputError(
                f"drawn_volume_config: got {sorted(unknown)}, expected settings of the volume stage: {known}."
            )
        components = {name: getattr(volume, name) for name in VOLUME_COMPONENTS}
        components |= {name: getattr(multiview, name) for name in MULTIVIEW_COMPONENTS}
        return cls(
            **components,
            elevation_estimator=elevation_estimator,
            multiview_config=_scalars(multiview),
            volume_config=_scalars(volume),
            texture_config=_scalars(texture),
            drawn_volume_config=drawn_volume_config,
            default_num_candidates=default_num_candidates,
            tell_kinds=tell_kinds,
            believe_picture=believe_picture,
        )

    @property
    def multiview(self) -> MultiViewTilePipeline:
        """Stage 1, image to views, on the current components."""
        return self._stage(MultiViewTilePipeline, MULTIVIEW_COMPONENTS, self.config.multiview_config)

    @property
    def volume(self) -> SparseVolumeDiffusionPipeline:
        """Stage 2, views to volume and mesh, on the current components."""
        return self._stage(SparseVolumeDiffusionPipeline, VOLUME_COMPONENTS, self.config.volume_config)

    @property
    def drawn_volume(self) -> SparseVolumeDiffusionPipeline:
        """Stage 2 with the settings for views that stage 1 drew."""
        scalars = {**self.config.volume_config, **self.config.drawn_volume_config}
        return self._stage(SparseVolumeDiffusionPipeline, VOLUME_COMPONENTS, scalars)

    @property
    def texture(self) -> TextureRefinementPipeline:
        """Stage 3, mesh and views to textured mesh."""
        return self._stage(TextureRefinementPipeline, (), self.config.texture_config)

    @property
    def rig(self) -> CameraRig:
        """Cameras of the views that stage 1 draws where a call does not say."""
        return CameraRig.named(self.multiview.config.rig)

    def _stage(self, stage_class: type, names: tuple[str, ...], scalars: dict[str, Any]):
        stage = stage_class(**{name: getattr(self, name) for name in names}, **scalars)
        stage.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return stage

    # --- steps of a call, in order ------------------------------------------------------------------------------

    def draw_prompt(self, prompt: str, text_to_image: DiffusionPipeline, generator) -> Image.Image:
        """The picture that a text-to-image pipeline draws of the prompt."""
        return text_to_image(prompt, generator=generator).images[0]

    def prepare_image(self, image, background: str = "auto") -> Image.Image:
        """The object of a picture or file, cut out, centred and square: `RGBA`, 512 pixels."""
        return frame_object(isolate_object(image, background=background))

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | str | list[Image.Image | str] | None = None,
        prompt: str | list[str] | None = None,
        text_to_image: DiffusionPipeline | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_occupancy_steps: int | None = None,
        num_sparse_steps: int | None = None,
        num_texture_steps: int | None = None,
        texture_size: int | None = None,
        max_faces: int | None = None,
        watertight: bool = False,
        refine: bool = True,
        background: str = "auto",
        elevation: float | list[float | None] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        control_image: Image.Image | list | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        num_candidates: int | None = None,
        rig: str | None = None,
    ) -> One2345PlusPlusPipelineOutput | tuple:
        r"""Make a textured mesh of the object in each image, or of each prompt.

        Args:
            image (`PIL.Image.Image`, file, or a list of them, *optional*): One object, from the front or nearly so.
            prompt (`str` or `list[str]`, *optional*): Text instead of an image; needs `text_to_image`.
            text_to_image ([`DiffusionPipeline`], *optional*): Any text-to-image pipeline of diffusers.
            num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*): Of the views.
            num_occupancy_steps, num_sparse_steps (`int`, *optional*): Of the two volume diffusions.
            num_texture_steps, texture_size (`int`, *optional*): Of the texture refinement; the size is in pixels.
            max_faces (`int`, *optional*): Most triangles of a mesh.
            watertight (`bool`, defaults to `False`): Make solids for printing, see `geometry.extract.solidify`.
            refine (`bool`, defaults to `True`): Paint a texture from the views; without, the mesh has vertex colours.
            background (`str`, defaults to `"auto"`): How the object is told from its background, see `isolate_object`.
            elevation (`float` or a list, *optional*): Degrees above the horizon (-90 to 90) from which the image looks, or each
                does; by default what the elevation estimator finds, if there is one. Then the image itself is one more view for the
                volume; for the texture it always is, from where the mesh looks most like it.
            generator (`torch.Generator` or a list, *optional*): Source of every random draw, on the CPU; a list has one an object.
            return_dict (`bool`, defaults to `True`): Return an output class instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(stage, step, timestep, tensors)` in every
                diffusion step of the views and of the volume, with `latents`, and of the texture, with its `loss`.
            control_image (`PIL.Image.Image` or a list, *optional*): Tile for the ControlNet, the same for every object; for
                several ControlNets a list with that of each.
            controlnet_conditioning_scale (`float` or a list, defaults to 1.0): Weight of the ControlNet, or of each.
            cross_attention_kwargs (`dict`, *optional*): For the attention of the views; `scale` is that of a LoRA.
            rig (`str`, *optional*): Cameras of the views, one of `multiview.rigs`; the checkpoint's first choice by default.
            num_candidates (`int`, *optional*): So many times views are drawn and reconstructed; what is returned is of the mesh whose
                outlines agree best with its views and the picture, see `pipelines.candidates`.

        Returns:
            [`One2345PlusPlusPipelineOutput`]: `meshes`, `views`, `volumes`, `coarse_meshes`, one an object. With an elevation, told or
            estimated, the meshes have the picture's proportions, see `geometry.picture_fit`; coarse meshes are as volumes and views
            have them.

        Raises:
            InputError: If the arguments or a picture cannot be used.
        """
        # 1. Check inputs
        if num_candidates is None:
            num_candidates = self.config.default_num_candidates
        number = check_call(
            image,
            prompt,
            text_to_image,
            generator,
            elevation,
            num_inference_steps=num_inference_steps,
            num_occupancy_steps=num_occupancy_steps,
            num_sparse_steps=num_sparse_steps,
            num_texture_steps=num_texture_steps,
            num_candidates=num_candidates,
            texture_size=texture_size,
            max_faces=max_faces,
        )
        multiview = self.multiview
        rig_name = multiview.choose_rig(rig)
        generators = generator if isinstance(generator, list) else [generator] * number

        # 2. Cut the object out and centre it
        if prompt is not None:
            drawn = zip(as_list(prompt), generators, strict=True)
            image = [self.draw_prompt(text, text_to_image, one) for text, one in drawn]
        images = [self.prepare_image(one, background) for one in as_list(image)]
        elevations = find_elevations(self.elevation_estimator, images, elevation, self._execution_device)

        # 3. Draw six views of each candidate, cut out of their grey
        rig = CameraRig.named(rig_name)
        tries = [each for each in zip(images, generators, strict=True) for _ in range(num_candidates)]
        views = [
            multiview(
                picture,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=one,
                callback_on_step_end=callback_on_step_end,
                control_image=control_image,
                controlnet_conditioning_scale=controlnet_conditioning_scale,
                cross_attention_kwargs=cross_attention_kwargs,
                transparent=True,
                rig=rig_name,
            ).views[0]
            for picture, one in tries
        ]

        # 4. Volume and mesh of each; of an object's the one that agrees best with all its pictures, and how its picture looks at it
        volume, kept = self.drawn_volume, []
        for first, picture, one, degrees in zip(
            range(0, len(views), num_candidates), images, generators, elevations, strict=True
        ):
            best = reconstruct_best(
                volume,
                views[first : first + num_candidates],
                rig,
                picture,
                degrees,
                believe_picture=self.config.believe_picture,
                tell_kinds=self.config.tell_kinds,
                num_occupancy_steps=num_occupancy_steps,
                num_sparse_steps=num_sparse_steps,
                generator=one,
                callback_on_step_end=callback_on_step_end,
            )
            kept.append(best)
        solids, views, fits = map(list, zip(*kept, strict=True))
        volumes = [solid.volumes[0] for solid in solids]
        coarse_meshes = [solid.meshes[0] for solid in solids]

        # 5. Refine the texture; the picture is one more view, and the only one that is not a guess
        if refine:
            texture = self.texture
            meshes = [
                texture(
                    mesh,
                    [*six, fit.view],
                    CameraRig.cat([rig, fit.camera]),
                    num_inference_steps=num_texture_steps,
                    texture_size=texture_size,
                    max_faces=max_faces,
                    watertight=watertight,
                    generator=one,
                    device=self._execution_device,
                    callback_on_step_end=callback_on_step_end,
                    trust=[1.0] * len(rig) + [PICTURE_TRUST],
                ).meshes[0]
                for mesh, six, fit, one in zip(coarse_meshes, views, fits, generators, strict=True)
            ]
        else:
            meshes = [finish_mesh(mesh, max_faces, watertight) for mesh in coarse_meshes]

        # 6. The front keeps the proportions that a picture of known elevation shows
        meshes = [
            mesh if degrees is None else stretch(mesh, fit.factors)
            for mesh, fit, degrees in zip(meshes, fits, elevations, strict=True)
        ]

        # 7. Output
        self.maybe_free_model_hooks()
        if not return_dict:
            return meshes, views, volumes, coarse_meshes
        return One2345PlusPlusPipelineOutput(meshes, views, volumes, coarse_meshes)


def _scalars(stage: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of a stage that are not components."""
    return {name: value for name, value in stage.config.items() if name not in stage.components and name[0] != "_"}
