"""Stage 1: one image to a tile of six views, the algorithm of Zero123++ on stock diffusers components.

Checking what a call is given, the layout of tiles, cutting backgrounds and training live elsewhere.
"""

# B images, n tiles an image, c latent channels, h w latent grid, L text tokens, D width of the text context

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, MultiControlNetModel, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..models.attention_reference import ReferenceAttention, reference_attention
from . import multiview_inputs
from .control import Control
from .hub import SelfContainedMixin
from .multiview_context import ContextMixin
from .multiview_inputs import within
from .pipeline_output import MultiViewTilePipelineOutput
from .preprocess import key_background
from .tiles import (
    BACKGROUND,
    COLUMNS,
    IMAGE_SCALE,
    ROWS,
    composite_on_grey,
    remove_grey,
    scale_latents,
    split_views,
    unscale_latents,
)


__all__ = [
    "BACKGROUND",
    "COLUMNS",
    "IMAGE_SCALE",
    "ROWS",
    "MultiViewTilePipeline",
    "composite_on_grey",
    "scale_latents",
    "unscale_latents",
]


class MultiViewTilePipeline(SelfContainedMixin, ContextMixin, DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    r"""Six consistent views of the object in one image, drawn as one tile of 3 rows and 2 columns.

    Folders of Zero123++ (v1.1, v1.2) load as they stand.

    Args:
        vae ([`AutoencoderKL`]): Images to latents and back. With four channels the last is the mask, -1 outside the object.
        text_encoder ([`~transformers.CLIPTextModel`]): Context of the prompt (usually empty).
        tokenizer ([`~transformers.CLIPTokenizer`]): Tokens of the prompt.
        unet ([`UNet2DConditionModel`]): Denoiser of the tile, and by reference attention the reader of the input image.
        scheduler ([`SchedulerMixin`]): Any stock scheduler; it also noises the reference.
        vision_encoder ([`~transformers.CLIPVisionModelWithProjection`]): Global feature of the input image.
        feature_extractor_clip ([`~transformers.CLIPImageProcessor`]): Pixels for the vision encoder.
        feature_extractor_vae ([`~transformers.CLIPImageProcessor`]): Pixels for the reference latent.
        controlnet ([`ControlNetModel`], [`MultiControlNetModel`] or a list, *optional*): Steers the tile by control pictures.
        ramping_coefficients (`list[float]`, *optional*): Share of the image feature in each text token, `L` numbers;
            `i / L` when not given (FlexDiffuse).
        view_size (`int`, defaults to 320): Side of a view in pixels.
        rig (`str`, defaults to `"zero123plus-v1.2"`): Cameras that the weights were trained for, or the first choice of several.
        rigs (`list[str]`, *optional*): All rigs that the weights know, in the order of the UNet's class embeddings; a call chooses.
        clean_reference (`bool`, defaults to `False`): For weights trained so, the reference is read once, without noise and at
            timestep 0. Zero123++ noises it like the tile, which in small latents hides outlines from the first steps.
        tile_positions (`bool`, defaults to `False`): For weights trained so, self-attention knows which view a token belongs to.
        default_num_inference_steps (`int`, defaults to 28), default_guidance_scale (`float`, defaults to 4.0): Used when a
            call does not say.
    """

    model_cpu_offload_seq = "text_encoder->vision_encoder->unet->vae"  # a ControlNet works between the unet's passes
    _optional_components = ["controlnet"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "reference_latents"]

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
        controlnet: ControlNetModel | MultiControlNetModel | list | tuple | None = None,
        ramping_coefficients: list | None = None,
        view_size: int = 320,
        rig: str = "zero123plus-v1.2",
        rigs: list | None = None,
        clean_reference: bool = False,
        tile_positions: bool = False,
        default_num_inference_steps: int = 28,
        default_guidance_scale: float = 4.0,
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
            controlnet=MultiControlNetModel(controlnet) if isinstance(controlnet, list | tuple) else controlnet,
        )
        self.register_to_config(
            ramping_coefficients=ramping_coefficients,
            view_size=view_size,
            rig=rig,
            rigs=rigs,
            clean_reference=clean_reference,
            tile_positions=tile_positions,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        self.choose_rig(rig)
        if unet is not None:
            multiview_inputs.check_rigs(self.rigs, unet.config.num_class_embeds)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # --- state of the running call ------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any step has a second branch."""
        return any(self._guided_steps)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def draws_masks(self) -> bool:
        """Whether the VAE carries the object's mask beside its colours."""
        return self.vae.config.in_channels == 4

    @property
    def rigs(self) -> list[str]:
        """Names of the rigs whose views the weights can draw."""
        return list(self.config.rigs or [self.config.rig])

    def choose_rig(self, rig: str | None) -> str:
        """The rig that a call asks for, the checkpoint's first choice if it does not say; refused if the weights do not know it."""
        rig = self.config.rig if rig is None else rig
        multiview_inputs.check_rig(rig, self.rigs)
        return rig

    # --- steps of a call, in order ------------------------------------------------------------------------------

    def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        return batch, self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def prepare_latents(self, batch: int, height: int, width: int, dtype, generator, latents: Tensor | None) -> Tensor:
        """First latents, `[B * n, c, height / f, width / f]`, at the scheduler's first noise level."""
        shape = self.latent_shape(batch, height, width)
        multiview_inputs.check_noise(latents, shape, generator)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        return latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma

    def noise_reference(self, reference: Tensor, timestep: Tensor, generator, branches: int = 1) -> Tensor:
        """The reference at the noise level of this step, scaled as the UNet expects, with fresh noise for each branch."""
        noise = torch.cat(
            [
                randn_tensor(branch.shape, generator=generator, device=branch.device, dtype=branch.dtype)
                for branch in reference.chunk(branches)
            ]
        )
        noised = self.scheduler.add_noise(reference, noise, timestep.expand(len(reference)))
        return self.scheduler.scale_model_input(noised, timestep)

    def predict(
        self,
        passes: ReferenceAttention,
        latents: Tensor,
        step: int,
        context: Tensor,
        reference: Tensor,
        generator,
        control: Control,
        **kwargs,
    ) -> Tensor:
        """The UNet's guided prediction at a step, `[B * n, c, h, w]`; `context` and `reference` of every branch, see `__call__`.

        In a group of `reuse_interval` steps only the first reads the reference and runs the negative branch. With `d = p - n`, the
        prediction less that of the negative branch, as the first step found it, the others predict `p + (guidance_scale - 1) d`.
        """
        timestep = self.scheduler.timesteps[step]
        first = step % self._reuse_interval == 0
        guided = self._guided_steps[step] and self._guidance_scale > 1  # a callback may have ended it
        both = guided and (first or self._direction is None)
        if not both:  # the negative branch is first
            context, reference = context[-len(latents) :], reference[-len(latents) :]
        branches = 1 + both
        sample = self.scheduler.scale_model_input(torch.cat([latents] * branches), timestep)
        known = passes.samples >= len(context)  # not at the first step, nor where guidance begins
        if self.config.clean_reference:
            if not known:
                passes.write(reference, torch.zeros_like(timestep), context, **kwargs)
        elif first or not known:
            passes.write(self.noise_reference(reference, timestep, generator, branches), timestep, context, **kwargs)
        residuals = control.residuals(sample, timestep, context, step, self.num_timesteps, kwargs.get("class_labels"))
        prediction = passes.read(sample, timestep, context, **kwargs, **residuals)
        if both:
            negative, positive = prediction.chunk(2)
            self._direction = positive - negative
            return negative + self.guidance_scale * self._direction
        return prediction + (self.guidance_scale - 1) * self._direction if guided else prediction

    def decode_latents(self, latents: Tensor) -> Tensor:
        """VAE latents (times the scaling factor) to pixels in [-1, 1], `[B * n, 3 or 4, height, width]`, see `vae`."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0] / IMAGE_SCALE

    split_views = staticmethod(split_views)

    def cut_out(self, views: list[list[Image.Image]], decoded: Tensor) -> list[list[Image.Image]]:
        """The views without their grey, `RGBA`: by the masks that the VAE decoded, else by the colour of the background."""
        if not self.draws_masks:
            return [[key_background(view) for view in six] for six in views]
        masks = self.image_processor.postprocess(decoded[:, 3:].expand(-1, 3, -1, -1), output_type="pil")
        return [
            [remove_grey(view, mask.getchannel(0)) for view, mask in zip(*both, strict=True)]
            for both in zip(views, self.split_views(masks), strict=True)
        ]

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | list[Image.Image],
        prompt: str | list[str] | None = "",
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        control_image: Image.Image | list | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        transparent: bool = False,
        reuse_interval: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        rig: str | None = None,
    ) -> MultiViewTilePipelineOutput | tuple:
        r"""Draw the six views of the object in each image.

        Args:
            image (`PIL.Image.Image` or a list of them): The object, centred and square. Transparent parts become grey.
            prompt (`str` or `list[str]`, defaults to `""`): Text beside the image.
            negative_prompt (`str` or `list[str]`, *optional*): Text of the negative branch, empty by default.
            num_inference_steps (`int`, *optional*): Denoising steps; the checkpoint's own number by default.
            guidance_scale (`float`, *optional*): Classifier-free guidance; 1 or less runs no second branch.
            num_images_per_prompt (`int`, defaults to 1): Tiles an image.
            height, width (`int`, *optional*): Size of the tile in pixels, `3 * view_size` by `2 * view_size` by default.
            generator (`torch.Generator` or a list, *optional*): Source of every random draw; a list has one a tile.
            latents (`torch.Tensor`, *optional*): Unit noise to start from, `[B * n, c, h, w]`.
            control_image (`PIL.Image.Image` or a list, *optional*): A tile of 3 rows and 2 columns for the ControlNet, or one an
                image; for several ControlNets a list with that of each. Without it the ControlNet rests.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (NHWC), `"pt"` (NCHW), both in [0, 1], or `"latent"`.
            return_dict (`bool`, defaults to `True`): Return an output class instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after each step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Tensors for the callback; those that it names itself, as
                diffusers' `PipelineCallback`s do, or `["latents"]`, by default.
            cross_attention_kwargs (`dict`, *optional*): For the attention processors; `scale` is that of a LoRA.
            controlnet_conditioning_scale (`float` or a list, defaults to 1.0): Weight of the ControlNet, or of each.
            control_guidance_start, control_guidance_end (`float` or lists): Share of the steps in which it acts.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Share of the steps in which guidance acts; the
                others run no second branch.
            transparent (`bool`, defaults to `False`): Cut the views out of their grey (`RGBA`); the tiles stay as drawn.
            reuse_interval (`int`, defaults to 1): Steps in a row that share one reading of the noised reference and one run of the
                negative branch; 1 is exact, 2 and more are faster, see `predict`.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): What `encode_prompt` made of the texts, `[B, L, D]`,
                instead of them. With both, the text encoder is not used.
            rig (`str`, *optional*): Cameras of the views, one of `rigs`; the checkpoint's first choice by default.

        Returns:
            [`MultiViewTilePipelineOutput`]: tiles in `images`, their views in `views`.

        Raises:
            InputError: If an argument cannot be used.
        """
        # 1. Check inputs
        config = self.config
        images = list(image) if isinstance(image, list | tuple) else [image]
        number, batch = len(images), len(images) * num_images_per_prompt
        prompts = multiview_inputs.as_texts(prompt, number)
        negative_prompts = multiview_inputs.as_texts(negative_prompt, number)
        height = ROWS * config.view_size if height is None else height
        width = COLUMNS * config.view_size if width is None else width
        if num_inference_steps is None:
            num_inference_steps = config.default_num_inference_steps
        names = callback_on_step_end_tensor_inputs
        if names is None:  # diffusers' own callbacks say what they need
            names = getattr(callback_on_step_end, "tensor_inputs", ["latents"])
        multiview_inputs.check_images(images)
        multiview_inputs.check_counts(
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            reuse_interval=reuse_interval,
        )
        multiview_inputs.check_texts(number, prompt=prompts, negative_prompt=negative_prompts)
        embeds_shape = number, self.unet.config.cross_attention_dim
        multiview_inputs.check_embeds("prompt", prompt, prompt_embeds, embeds_shape)
        multiview_inputs.check_embeds("negative_prompt", negative_prompt, negative_prompt_embeds, embeds_shape)
        multiview_inputs.check_size(height, width, config.view_size, self.vae_scale_factor)
        multiview_inputs.check_noise(latents, self.latent_shape(batch, height, width), generator)
        multiview_inputs.check_output(output_type, transparent)
        rig = self.choose_rig(rig)
        multiview_inputs.check_tensor_inputs(names, self._callback_tensor_inputs)
        multiview_inputs.check_share("guidance_interval", *guidance_interval)
        control = Control.of(
            self.controlnet,
            control_image,
            number,
            height,
            width,
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
        )
        self._guidance_scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._reuse_interval = reuse_interval
        self._direction = None  # of guidance
        self._interrupt = False

        # 2. Timesteps
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps
        steps = self._num_timesteps = len(timesteps)
        self._guided_steps = [
            self._guidance_scale > 1 and within(step, steps, *guidance_interval) for step in range(steps)
        ]

        # 3. Encode the condition
        lora_scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        opaque = [composite_on_grey(image) for image in images]
        prompt_embeds = self.prepare_context(
            opaque,
            prompts if prompt_embeds is None else prompt_embeds,
            negative_prompts if negative_prompt_embeds is None else negative_prompt_embeds,
            num_images_per_prompt,
            lora_scale,
        )
        reference_latents = self.prepare_reference(images, num_images_per_prompt, generator).to(prompt_embeds.dtype)

        # 4. Initial latents, and control pictures for them
        latents = self.prepare_latents(batch, height, width, prompt_embeds.dtype, generator, latents)
        control.prepare(latents, num_images_per_prompt)

        # 5. Denoise
        step_kwargs = (
            {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        )
        tile = (ROWS, COLUMNS) if config.tile_positions else None
        label = torch.tensor(
            [self.rigs.index(rig)], device=latents.device
        )  # a UNet without classes does not look at it
        with reference_attention(self.unet, tile) as passes, self.progress_bar(total=steps) as progress:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self.predict(
                    passes,
                    latents,
                    step,
                    prompt_embeds,
                    reference_latents,
                    generator,
                    control,
                    cross_attention_kwargs=cross_attention_kwargs,
                    class_labels=label,
                )
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "reference_latents": reference_latents,
                    }
                    changed = callback_on_step_end(self, step, timestep, {name: tensors[name] for name in names}) or {}
                    latents = changed.get("latents", latents)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                    reference_latents = changed.get("reference_latents", reference_latents)
                    if not {"prompt_embeds", "reference_latents"}.isdisjoint(changed):
                        passes.tokens.clear()  # read the reference anew
                        self._direction = None
                progress.update()

        # 6. Decode
        latents = unscale_latents(latents)
        if output_type == "latent":
            tiles, views = latents, None
        else:
            decoded = self.decode_latents(latents)
            tiles = self.image_processor.postprocess(decoded[:, :3], output_type=output_type)
            views = self.split_views(tiles)
            if transparent:
                views = self.cut_out(views, decoded)
        self.maybe_free_model_hooks()
        return MultiViewTilePipelineOutput(tiles, views) if return_dict else (tiles, views)
