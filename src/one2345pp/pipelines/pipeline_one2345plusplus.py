"""The chain: one image or prompt to a textured mesh. What each stage does lives in the stage's own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import trimesh
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, MultiControlNetModel, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.schedulers import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import replace_example_docstring
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection, Dinov2Model

from ..geometry.cameras import CameraRig
from ..geometry.extract import finish_mesh
from ..geometry.framing import frame_object
from ..geometry.views import Views
from ..models.condition_encoder import ConditionEncoder
from ..models.elevation import ElevationEstimator
from ..models.unet_occupancy import OccupancyUNet3DModel
from ..models.unet_sparse import SparseUNet3DModel
from .chain import checks
from .chain.agreement import tell_disagreement
from .chain.presets import suited_to
from .chain.stage_chain import StageChain, stage_property
from .picture.guide import Candidate, GuideSettings, PictureGuide, best_candidate, find_elevations
from .picture.isolate import cut_out_views, isolate_object
from .pipeline_multiview_tile import MultiViewTilePipeline
from .pipeline_output import One2345PlusPlusPipelineOutput
from .pipeline_sparse_volume import SparseVolumeDiffusionPipeline
from .pipeline_texture_refinement import TextureRefinementPipeline
from .roles import Drawer, Painter, Reconstructor
from .stages import register_arguments


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from one2345pp import One2345PlusPlusPipeline, default_checkpoint
        >>> pipe = One2345PlusPlusPipeline.from_pretrained(default_checkpoint())
        >>> pipe("mug.png").meshes[0].export("mug.glb")
        ```
"""


class One2345PlusPlusPipeline(StageChain, StableDiffusionLoraLoaderMixin):
    r"""Image or prompt to a textured mesh, the whole of One-2-3-45++: draw views, reconstruct a solid, paint it.

    The components of the stages lie flat beside each other. The stages themselves, `multiview`, `volume` and `texture`, are built from
    them and never stale: what is swapped here or there is used at once. Other stages fill the roles of `pipelines.roles`, see
    `from_stages`. LoRA weights are those of the views' UNet and text encoder.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, vision_encoder, feature_extractor_clip, feature_extractor_vae:
            Components of [`MultiViewTilePipeline`].
        occupancy_condition, occupancy_unet, occupancy_scheduler, sparse_condition, sparse_unet, sparse_scheduler:
            Components of [`SparseVolumeDiffusionPipeline`].
        controlnet ([`ControlNetModel`], [`MultiControlNetModel`] or a list, *optional*): Steers the views by control pictures.
        volume_vision_encoder, volume_feature_extractor_clip (*optional*): Of the volume stage, where it is not the first stage's.
        patch_encoder (*optional*): Image features for the volume stage, if its weights were trained with them.
        fine_condition, fine_unet ([`ConditionEncoder`], [`SparseUNet3DModel`], *optional*): Its third network.
        elevation_estimator ([`ElevationEstimator`], *optional*): Says from how high an image looks, where a call does not.
        multiview_config, volume_config, texture_config (`dict`, *optional*): The settings of the stages.
        drawn_volume_config (`dict`, *optional*): Those of the volume stage that are others for drawn views: where views do not quite
            agree, a thicker surface or a wider support may be better.
        guide_config (`dict` or [`GuideSettings`], *optional*): Of the picture's guide; with `None` the chain is the paper's.
    """

    STAGES = {
        "multiview": MultiViewTilePipeline,
        "volume": SparseVolumeDiffusionPipeline,
        "texture": TextureRefinementPipeline,
    }
    VARIANTS = {"drawn_volume": "volume"}
    OWN_PARTS = {"volume": ("vision_encoder", "feature_extractor_clip")}
    OTHER_PARTS = ("elevation_estimator",)

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
        occupancy_scheduler: SchedulerMixin,
        sparse_condition: ConditionEncoder,
        sparse_unet: SparseUNet3DModel,
        sparse_scheduler: SchedulerMixin,
        controlnet: ControlNetModel | MultiControlNetModel | list | tuple | None = None,
        volume_vision_encoder: CLIPVisionModelWithProjection | None = None,
        volume_feature_extractor_clip: CLIPImageProcessor | None = None,
        patch_encoder: Dinov2Model | None = None,
        fine_condition: ConditionEncoder | None = None,
        fine_unet: SparseUNet3DModel | None = None,
        elevation_estimator: ElevationEstimator | None = None,
        multiview_config: dict | None = None,
        volume_config: dict | None = None,
        texture_config: dict | None = None,
        drawn_volume_config: dict | None = None,
        guide_config: dict | GuideSettings | None = GuideSettings(),  # noqa: B008, it is frozen
    ):
        super().__init__()
        controlnet = MultiControlNetModel(controlnet) if isinstance(controlnet, list | tuple) else controlnet
        guide_config = None if guide_config is None else asdict(GuideSettings.of(guide_config))
        multiview_config, volume_config = dict(multiview_config or {}), dict(volume_config or {})
        texture_config, drawn_volume_config = dict(texture_config or {}), dict(drawn_volume_config or {})
        register_arguments(self, locals())

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `ConfigMixin.extract_init_dict`; the guide's settings of folders of version 0.1.0 have other names."""
        return super().extract_init_dict(checks.with_guide_config(config_dict), **kwargs)

    # --- stages -------------------------------------------------------------------------------------------------

    @classmethod
    def from_stages(
        cls,
        multiview: MultiViewTilePipeline | Drawer,
        volume: SparseVolumeDiffusionPipeline | Reconstructor,
        texture: TextureRefinementPipeline | Painter | None = None,
        drawn_volume_config: dict | None = None,
        guide_config: dict | GuideSettings | None = GuideSettings(),  # noqa: B008, it is frozen
        elevation_estimator: ElevationEstimator | None = None,
    ) -> One2345PlusPlusPipeline:
        """A chain of stages: of this package, whose components it shares, or of anybody, in the roles of `pipelines.roles`.

        The volume stage keeps its own image encoder, whose width its weights know; without one it takes the first stage's. A chain
        with a stage that is not of this package cannot be saved. Raises `InputError` if the stages do not fit each other.
        """
        if isinstance(volume, SparseVolumeDiffusionPipeline):
            checks.check_volume_stage(volume, drawn_volume_config or {}, getattr(multiview, "vision_encoder", None))
        stages = {"multiview": multiview, "volume": volume, "texture": texture or TextureRefinementPipeline()}
        others = {"drawn_volume_config": drawn_volume_config, "guide_config": guide_config}
        return cls.of_stages(stages, elevation_estimator=elevation_estimator, **others)

    def settings_for(self, stages: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for drawn views and of the guide that suit another first stage, see `chain.presets`."""
        return suited_to(stages.get("multiview"), self.config.guide_config)

    multiview = stage_property("multiview", "Stage 1, image to views, on the current components.")
    volume = stage_property("volume", "Stage 2, views to volume and mesh, on the current components.")
    drawn_volume = stage_property("drawn_volume", "Stage 2 with the settings for views that stage 1 drew.")
    texture = stage_property("texture", "Stage 3, mesh and views to textured mesh.")

    @property
    def guide(self) -> GuideSettings | None:
        """Settings of the picture's guide, if there is one; to be assigned."""
        return None if self.config.guide_config is None else GuideSettings.of(self.config.guide_config)

    @guide.setter
    def guide(self, settings: GuideSettings | Mapping[str, Any] | None) -> None:
        self.register_to_config(guide_config=None if settings is None else asdict(GuideSettings.of(settings)))

    # --- steps of a call, in order ------------------------------------------------------------------------------

    def check_inputs(self, *, rig: str | None, num_candidates: int | None, **inputs) -> int:
        """Number of objects asked for; raises `InputError` for what the call could not use, see `chain.checks.check_inputs`."""
        if isinstance(self.multiview, MultiViewTilePipeline):
            self.multiview.choose_rig(rig)
        return checks.check_inputs(guided=self.guide is not None, num_candidates=num_candidates, **inputs)

    def draw_prompt(self, prompt: str, text_to_image: DiffusionPipeline, generator=None) -> Image.Image:
        """The picture that a text-to-image pipeline draws of the prompt."""
        return text_to_image(prompt, generator=generator).images[0]

    def prepare_image(self, image: Image.Image | str, background: str = "auto") -> Image.Image:
        """The object of a picture or file, cut out, centred and square: `RGBA`, 512 pixels; `background="none"`: it is already."""
        if background == "none":
            return checks.check_prepared(image)
        return frame_object(isolate_object(image, background=background))

    def prepare_guides(self, pictures: list[Image.Image], elevation=None) -> list[PictureGuide]:
        """What pictures as `prepare_image` makes them say of their objects; elevations that are not told are estimated."""
        elevations = find_elevations(self.elevation_estimator, pictures, elevation, self._execution_device)
        return [PictureGuide(one, degrees, self.guide) for one, degrees in zip(pictures, elevations, strict=True)]

    def reconstruct_best(
        self,
        candidates: list[Views],
        image: Image.Image | None = None,
        guide: PictureGuide | None = None,
        generator: torch.Generator | None = None,
        drawn: bool = False,
        **options,
    ) -> Candidate:
        """The solid of each candidate's views, and of those the best, see `picture.guide.best_candidate`."""
        stage = self.drawn_volume if drawn else self.volume
        return best_candidate(
            partial(stage.reconstruct, image=image, generator=generator, **options), candidates, guide
        )

    def paint(
        self,
        candidate: Candidate,
        guide: PictureGuide | None = None,
        generator: torch.Generator | None = None,
        refine: bool = True,
        **options,
    ) -> trimesh.Trimesh:
        """The candidate's mesh with a texture from its views, or its own colours without `refine`; with a guide the picture is one
        more view, and the front has its proportions if its elevation is known."""
        mesh = candidate.solid.mesh
        if refine:
            views, trust = (candidate.views, None) if guide is None else guide.texture_views(candidate)
            mesh = self.texture.paint(mesh, views, generator=generator, **options, **checks.given(trust=trust))
        else:
            mesh = finish_mesh(mesh, **{name: options.get(name) for name in ("max_faces", "watertight")})
        return mesh if guide is None else guide.proportion(mesh, candidate)

    @torch.no_grad()
    def reconstruct(
        self,
        views: Views | list,
        cameras: CameraRig | str | list[CameraRig | str] | None = None,
        image: Image.Image | str | list[Image.Image | str] | None = None,
        elevation: float | list[float | None] | None = None,
        background: str = "auto",
        drawn: bool = False,
        num_occupancy_steps: int | None = None,
        num_sparse_steps: int | None = None,
        guidance_scale: float | None = None,
        num_texture_steps: int | None = None,
        texture_size: int | None = None,
        max_faces: int | None = None,
        watertight: bool = False,
        refine: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        return_dict: bool = True,
    ) -> One2345PlusPlusPipelineOutput | tuple:
        r"""Stages 2 and 3: views to a textured mesh. Every way from views to meshes goes through here, that of a call, too.

        Args:
            views ([`Views`], `list[PIL.Image.Image]`, or a list of those): Views of each object, RGBA, or RGB on a plain background;
                of drawn ones a list of `Views` an object is candidates, of which the guide keeps the best.
            cameras ([`CameraRig`], `str`, or a list, *optional*): Cameras of views that are lists.
            image (`PIL.Image.Image`, file, or a list, *optional*): The picture of the front, for networks that look at it.
            drawn (`bool`, defaults to `False`): Whether stage 1 drew the views of the image. Then the volume stage has its settings
                for such views, and the image guides.
            num_occupancy_steps, num_sparse_steps, guidance_scale: Of the volume diffusions.
            And as in a call: elevation, background, num_texture_steps, texture_size, max_faces, watertight, refine, generator,
            callback_on_step_end, callback_on_step_end_tensor_inputs, return_dict.
        Raises `InputError` if the arguments or views cannot be used, or views have no surface.
        """
        # 1. Check inputs
        candidates = checks.as_candidates(views, cameras)
        number, guided = len(candidates), drawn and image is not None and self.guide is not None
        numbers = {"num_texture_steps": num_texture_steps, "texture_size": texture_size, "max_faces": max_faces}
        numbers["num_candidates"] = max(map(len, candidates))
        checks.check_object_inputs(number, generator, elevation, guided, **numbers)
        images = checks.one_each("image", image, number)
        generators = generator if isinstance(generator, list) else [generator] * number
        callbacks = checks.callbacks_of(self.stages, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 2. Cut out what is not, and ask what the pictures say
        candidates = [[cut_out_views(one) for one in each] for each in candidates]
        pictures = [None if one is None else self.prepare_image(one, background) for one in images]
        guides = self.prepare_guides(pictures, elevation) if guided else [None] * number

        # 3. Reconstruct, and of an object's candidates keep the best
        steps = {"num_occupancy_steps": num_occupancy_steps, "num_sparse_steps": num_sparse_steps}
        options = checks.given(**steps, guidance_scale=guidance_scale) | callbacks["volume"] | {"drawn": drawn}
        of_each = zip(candidates, pictures, guides, generators, strict=True)
        kept = [self.reconstruct_best(*one, **options) for one in of_each]
        for one in [] if drawn else kept:
            tell_disagreement(one.solid.mesh, one.views)

        # 4. Paint
        numbers = {"num_inference_steps": num_texture_steps, "texture_size": texture_size, "max_faces": max_faces}
        options = checks.given(**numbers, watertight=watertight or None) | callbacks["texture"]
        options |= {"device": self._execution_device, "refine": refine}
        meshes = [self.paint(*one, **options) for one in zip(kept, guides, generators, strict=True)]

        # 5. Output
        self.maybe_free_model_hooks()
        output = One2345PlusPlusPipelineOutput.of(meshes, kept, guides)
        return output if return_dict else tuple(vars(output).values())

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: Image.Image | str | list[Image.Image | str] | None = None,
        prompt: str | list[str] | None = None,
        text_to_image: DiffusionPipeline | None = None,
        control_image: Image.Image | list | None = None,
        elevation: float | list[float | None] | None = None,
        background: str = "auto",
        rig: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_occupancy_steps: int | None = None,
        num_sparse_steps: int | None = None,
        num_texture_steps: int | None = None,
        num_candidates: int | None = None,
        texture_size: int | None = None,
        max_faces: int | None = None,
        watertight: bool = False,
        refine: bool = True,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        return_dict: bool = True,
    ) -> One2345PlusPlusPipelineOutput | tuple:
        r"""Make a textured mesh of the object in each image, or of each prompt.

        Args:
            image (`PIL.Image.Image`, file, or a list of them, *optional*): One object, from the front or nearly so.
            prompt (`str` or `list[str]`, *optional*): Text instead of an image.
            text_to_image ([`DiffusionPipeline`], *optional*): Draws the prompt: any text-to-image pipeline of diffusers.
            control_image (`PIL.Image.Image` or a list, *optional*): Tile for the ControlNet, the same for every object; for
                several ControlNets a list with that of each.
            elevation (`float` or a list, *optional*): Degrees above the horizon (-90 to 90) from which the image looks; by default
                what the elevation estimator finds, if there is one. What the guide does with it: `GuideSettings`.
            background (`str`, defaults to `"auto"`): See `isolate_object`; `"none"` for images that `prepare_image` has made.
            rig (`str`, *optional*): Cameras of the views, one of `multiview.rigs`; the checkpoint's first choice by default.
            num_inference_steps, guidance_scale (*optional*): Of the views. num_occupancy_steps, num_sparse_steps: Of the volume.
            num_texture_steps, texture_size (*optional*): Of the texture refinement; the size is in pixels.
            num_candidates (`int`, *optional*): Tries at the views and the solid, of which the guide keeps the best.
            max_faces (`int`, *optional*): Most triangles of a mesh. watertight (`bool`): Make solids for printing, see `solidify`.
            refine (`bool`, defaults to `True`): Paint a texture from the views; without, the mesh has vertex colours.
            controlnet_conditioning_scale (`float` or a list, defaults to 1.0): Weight of the ControlNet, or of each.
            cross_attention_kwargs (`dict`, *optional*): For the attention of the views; `scale` is that of a LoRA.
            generator (`torch.Generator` or a list, *optional*): Source of every random draw, on the CPU; a list has one an object.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(stage, step, timestep, tensors)` in every step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): What it is given, of what each stage has.
            return_dict (`bool`, defaults to `True`): Return an output class instead of a tuple.

        Examples:

        Returns [`One2345PlusPlusPipelineOutput`], one entry an object. Raises `InputError` if arguments or a picture cannot be used.
        """
        # 1. Check inputs
        numbers = {
            "num_occupancy_steps": num_occupancy_steps,
            "num_sparse_steps": num_sparse_steps,
            "num_texture_steps": num_texture_steps,
            "texture_size": texture_size,
            "max_faces": max_faces,
        }
        number = self.check_inputs(
            image=image,
            prompt=prompt,
            text_to_image=text_to_image,
            elevation=elevation,
            rig=rig,
            num_inference_steps=num_inference_steps,
            num_candidates=num_candidates,
            generator=generator,
            **numbers,
        )
        generators = generator if isinstance(generator, list) else [generator] * number
        callbacks = checks.callbacks_of(self.stages, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 2. Cut the object out and centre it
        if prompt is not None:
            prompts = zip(checks.as_list(prompt), generators, strict=True)
            image = [self.draw_prompt(text, text_to_image, one) for text, one in prompts]
        pictures = [self.prepare_image(one, background) for one in checks.as_list(image)]

        # 3. Draw views, of each object as often as there are candidates
        options = checks.given(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, rig=rig)
        options |= checks.given(cross_attention_kwargs=cross_attention_kwargs) | callbacks["multiview"]
        if control_image is not None:
            options |= {"control_image": control_image, "controlnet_conditioning_scale": controlnet_conditioning_scale}
        tries = range(num_candidates or (1 if self.guide is None else self.guide.num_candidates))
        views = [
            [self.multiview.draw(picture, generator=one, **options) for _ in tries]
            for picture, one in zip(pictures, generators, strict=True)
        ]

        # 4. Reconstruct and paint
        return self.reconstruct(
            views,
            image=pictures,
            elevation=elevation,
            background="none",
            drawn=True,
            **numbers,
            watertight=watertight,
            refine=refine,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            return_dict=return_dict,
        )
