"""Stage 1: one image to a tile of six views, the algorithm of Zero123++ on stock diffusers components.

Checking what a call is given, the layout of tiles, cutting backgrounds and training live elsewhere.
"""

# B images, n tiles an image, c latent channels, h w latent grid, L text tokens, D width of the text context

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, MultiControlNetModel, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..geometry.tile import COLUMNS, ROWS, composite_on_grey, split_tiles
from ..geometry.views import Views
from ..models.attention_reference import ReferenceAttention, reference_attention
from .callbacks import end_step, tensor_names
from .hub import SelfContainedMixin
from .multiview import checks
from .multiview.context import encode_reference, encode_sides, encode_texts, join_context, reference_pixels
from .multiview.control import Control
from .multiview.latents import IMAGE_SCALE, unscale_latents
from .multiview.masks import cut_out
from .pipeline_output import MultiViewTilePipelineOutput
from .stages import StageMixin, register_arguments


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from one2345pp import MultiViewTilePipeline

        >>> pipe = MultiViewTilePipeline.from_pretrained("sudo-ai/zero123plus-v1.2")
        >>> pipe(Image.open("mug.png")).views[0].save("mug")  # six pictures and cameras.json
        ```
"""


class MultiViewTilePipeline(StageMixin, SelfContainedMixin, DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    r"""Six consistent views of the object in one image, drawn as one tile of 3 rows and 2 columns.

    Folders of Zero123++ (v1.1, v1.2) load as they stand.

    Args:
        vae ([`AutoencoderKL`]): Images to latents and back. With four channels the last is the mask, -1 outside the object.
        text_encoder ([`~transformers.CLIPTextModel`]), tokenizer ([`~transformers.CLIPTokenizer`]): Context of the prompt.
        unet ([`UNet2DConditionModel`]): Denoiser of the tile, and by reference attention the reader of the input image.
        scheduler ([`SchedulerMixin`]): Any stock scheduler; it also noises the reference.
        vision_encoder ([`~transformers.CLIPVisionModelWithProjection`]): Global feature of the input image.
        feature_extractor_clip, feature_extractor_vae ([`~transformers.CLIPImageProcessor`]): Pixels for the vision encoder, and VAE.
        controlnet ([`ControlNetModel`], [`MultiControlNetModel`] or a list, *optional*): Steers the tile by control pictures.
        ramping_coefficients (`list[float]`, *optional*): Share of the image feature in each text token, `L` numbers;
            `i / L` when not given (FlexDiffuse).
        view_size (`int`, defaults to 320): Side of a view in pixels.
        rig (`str`, defaults to `"zero123plus-v1.2"`): Cameras that the weights were trained for, or the first choice of several.
        rigs (`list[str]`, *optional*): All rigs that the weights know, in the order of the UNet's class embeddings; a call chooses.
        clean_reference (`bool`, defaults to `False`): For weights trained so, the reference is read once, without noise and at
            timestep 0. Zero123++ noises it like the tile, which in small latents hides outlines from the first steps.
        tile_positions (`bool`, defaults to `False`): For weights trained so, self-attention knows which view a token belongs to.
        default_num_inference_steps (`int`, defaults to 28), default_guidance_scale (`float`, defaults to 4.0): If a call does not say.
    """

    model_cpu_offload_seq = "text_encoder->vision_encoder->unet->vae"  # a ControlNet works between the unet's passes
    _optional_components = ["controlnet"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "reference_latents"]
    _guidance_interval = (0.0, 1.0)  # of the running call

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
        controlnet = MultiControlNetModel(controlnet) if isinstance(controlnet, list | tuple) else controlnet
        register_arguments(self, locals())
        self.choose_rig(rig)
        checks.check_rigs(self.rigs, unet)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # --- state of the running call ------------------------------------------------------------------------------

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any step has a second branch."""
        return any(self.is_guided(step) for step in range(len(self.scheduler.timesteps)))

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
        checks.check_rig(rig, self.rigs)
        return rig

    def is_guided(self, step: int) -> bool:
        """Whether the step, one of the scheduler's, has a second branch."""
        steps = len(self.scheduler.timesteps)
        return self._guidance_scale > 1 and checks.within(step, steps, *self._guidance_interval)

    # --- the role of a stage ------------------------------------------------------------------------------------

    def draw(self, image: Image.Image, *, generator: torch.Generator | None = None, **options) -> Views:
        """The views of one picture, cut out of their grey, and their cameras; options as those of a call."""
        return self(image, generator=generator, transparent=True, **options).views[0]

    # --- steps of a call, in order ------------------------------------------------------------------------------

    def check_inputs(self, *, images, height=None, width=None, num_images_per_prompt=1, **inputs) -> tuple[int, int]:
        """Height and width of the tile in pixels; raises `InputError` for what the call could not use, see `checks.check_inputs`."""
        height, width = checks.tile_size(height, width, self.config.view_size, self.vae_scale_factor)
        inputs["latent_shape"] = self.latent_shape(len(images) * num_images_per_prompt, height, width)
        inputs["context_width"] = self.unet.config.cross_attention_dim
        checks.check_inputs(images=images, num_images_per_prompt=num_images_per_prompt, **inputs)
        return height, width

    def encode_prompt(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None, lora_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Text contexts of `B` prompts and of their negative ones (empty by default), `[B, L, D]` each: what a call takes as
        `prompt_embeds` and `negative_prompt_embeds`. Needs the text encoder and the tokenizer alone."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negative_prompts = checks.as_texts(negative_prompt, len(prompts))
        checks.check_texts(len(prompts), prompt=prompts, negative_prompt=negative_prompts)
        negative_prompt_embeds, prompt_embeds = self.encode_texts([*negative_prompts, *prompts], lora_scale).chunk(2)
        return prompt_embeds, negative_prompt_embeds

    def encode_texts(self, texts: list[str], lora_scale: float = 1.0) -> Tensor:
        """Context of `B` texts, `[B, L, D]`."""
        return encode_texts(self.text_encoder, self.tokenizer, texts, self._execution_device, lora_scale)

    def encode_image(self, images: list[Image.Image]) -> Tensor:
        """Global features of `B` opaque RGB images, `[B, 1, D]`."""
        pixels = self.feature_extractor_clip(images, return_tensors="pt").pixel_values
        pixels = pixels.to(self._execution_device, self.vision_encoder.dtype)
        return self.vision_encoder(pixels).image_embeds[:, None]

    def prepare_context(
        self,
        images: list[Image.Image],  # [B]
        prompts: list[str] | Tensor,  # [B] or [B, L, D]
        negative_prompts: list[str] | Tensor,  # [B] or [B, L, D]
        num_images_per_prompt: int = 1,
        lora_scale: float = 1.0,
    ) -> Tensor:
        """Cross-attention context, `[B * n, L, D]`, or with guidance `[2 * B * n, L, D]`, the negative branch first: text plus ramp
        times image feature; plain text in the negative branch."""
        sides = [negative_prompts, prompts] if self.do_classifier_free_guidance else [prompts]
        sides = encode_sides(sides, partial(self.encode_texts, lora_scale=lora_scale))
        sides = [side.to(self._execution_device, self.unet.dtype) for side in sides]
        context = join_context(sides, self.encode_image(images), self.config.ramping_coefficients)
        return context.repeat_interleave(num_images_per_prompt, 0)

    def prepare_pixels(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """What the VAE encodes: an empty picture `[1, 3, h, w]` and `B` pictures on grey; with masks if the VAE has four channels."""
        pixels = reference_pixels(images, self.feature_extractor_vae, self.draws_masks)
        return tuple(part.to(self._execution_device, self.vae.dtype) for part in pixels)

    def prepare_reference(self, images: list[Image.Image], num_images_per_prompt: int = 1, generator=None) -> Tensor:
        """Latents that the tile attends to, `[B * n, c, h, w]`, or with guidance `[2 * B * n, c, h, w]`, the negative branch first,
        whose latent is that of an empty picture.

        They are not multiplied by the VAE's scaling factor: that is the "5x" scale of Zero123++ section 2.2.
        """
        empty, pixels = self.prepare_pixels(images)
        empty = empty if self.do_classifier_free_guidance else None
        return encode_reference(self.vae, empty, pixels, num_images_per_prompt, generator)

    def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        return batch, self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def prepare_latents(self, batch: int, height: int, width: int, generator=None, latents=None) -> Tensor:
        """First latents, `[B * n, c, height / f, width / f]`, at the scheduler's first noise level, of unit noise given or drawn."""
        shape, device, dtype = self.latent_shape(batch, height, width), self._execution_device, self.unet.dtype
        checks.check_noise(latents, shape, generator)
        latents = randn_tensor(shape, generator, device, dtype) if latents is None else latents
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def noise_reference(self, reference: Tensor, timestep: Tensor, generator=None, branches: int = 1) -> Tensor:
        """The reference at the noise level of this step, scaled as the UNet expects, with fresh noise for each branch."""
        noise = [randn_tensor(one.shape, generator, one.device, one.dtype) for one in reference.chunk(branches)]
        noised = self.scheduler.add_noise(reference, torch.cat(noise), timestep.expand(len(reference)))
        return self.scheduler.scale_model_input(noised, timestep)

    def predict(
        self,
        passes: ReferenceAttention,
        latents: Tensor,  # [B * n, c, h, w]
        step: int,
        context: Tensor,  # of every branch, see `prepare_context`
        reference: Tensor,  # of every branch, see `prepare_reference`
        generator=None,
        control: Control | None = None,
        **kwargs,
    ) -> Tensor:
        """The UNet's guided prediction at a step of the scheduler, `[B * n, c, h, w]`: `n + guidance_scale (p - n)`."""
        timestep, guided = self.scheduler.timesteps[step], self.is_guided(step)
        if not guided:  # the negative branch is first
            context, reference = context[-len(latents) :], reference[-len(latents) :]
        branches = 1 + guided
        sample = self.scheduler.scale_model_input(torch.cat([latents] * branches), timestep)
        if not self.config.clean_reference:
            passes.write(self.noise_reference(reference, timestep, generator, branches), timestep, context, **kwargs)
        elif passes.samples < len(context):  # at the first step, and where guidance begins
            passes.write(reference, torch.zeros_like(timestep), context, **kwargs)
        if control is not None:
            steps = len(self.scheduler.timesteps)
            kwargs |= control.residuals(sample, timestep, context, step, steps, kwargs.get("class_labels"))
        prediction = passes.read(sample, timestep, context, **kwargs)
        if not guided:
            return prediction
        negative, positive = prediction.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """VAE latents (times the scaling factor) to pixels in [-1, 1], `[B * n, 3 or 4, height, width]`, see `vae`."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0] / IMAGE_SCALE

    def cut_out(self, views: list[Views], decoded: Tensor) -> list[Views]:
        """The views without their grey, `RGBA`: by the masks of `decoded`, as `decode_latents` gives it, else by their background."""
        return cut_out(views, decoded[:, 3:] if self.draws_masks else None)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: Image.Image | list[Image.Image],
        prompt: str | list[str] | None = "",
        negative_prompt: str | list[str] | None = None,
        control_image: Image.Image | list | None = None,
        rig: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        transparent: bool = False,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        return_dict: bool = True,
    ) -> MultiViewTilePipelineOutput | tuple:
        r"""Draw the six views of the object in each image.

        Args:
            image (`PIL.Image.Image` or a list of them): The object, centred and square. Transparent parts become grey.
            prompt, negative_prompt (`str` or `list[str]`, *optional*): Text beside the image, and that of the negative branch.
            control_image (`PIL.Image.Image` or a list, *optional*): A tile of 3 rows and 2 columns for the ControlNet, or one an
                image; for several ControlNets a list with that of each. Without it the ControlNet rests.
            rig (`str`, *optional*): Cameras of the views, one of `rigs`; the checkpoint's first choice by default.
            height, width (`int`, *optional*): Size of the tile in pixels, `3 * view_size` by `2 * view_size` by default.
            num_inference_steps (`int`, *optional*): Denoising steps; the checkpoint's own number by default.
            guidance_scale (`float`, *optional*): Classifier-free guidance; 1 or less runs no second branch.
            guidance_interval (`tuple`, defaults to `(0.0, 1.0)`): Share of the steps with guidance; the others run no second branch.
            num_images_per_prompt (`int`, defaults to 1): Tiles an image.
            controlnet_conditioning_scale (`float` or a list, defaults to 1.0): Weight of the ControlNet, or of each.
            control_guidance_start, control_guidance_end (`float` or lists): Share of the steps in which it acts.
            cross_attention_kwargs (`dict`, *optional*): For the attention processors; `scale` is that of a LoRA.
            generator (`torch.Generator` or a list, *optional*): Source of every random draw; a list has one a tile.
            latents (`torch.Tensor`, *optional*): Unit noise to start from, `[B * n, c, h, w]`.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): What `encode_prompt` made of the texts, `[B, L, D]`,
                instead of them. With both, the text encoder is not used.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (NHWC), `"pt"` (NCHW), both in [0, 1], or `"latent"`.
            transparent (`bool`, defaults to `False`): Cut the views out of their grey (`RGBA`); the tiles stay as drawn.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after each step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Tensors for the callback, see `callbacks.tensor_names`.
            return_dict (`bool`, defaults to `True`): Return an output class instead of a tuple.

        Examples:

        Returns:
            [`MultiViewTilePipelineOutput`], tiles and their views. Raises `InputError` if an argument cannot be used.
        """
        # 1. Check inputs
        config, rig = self.config, self.choose_rig(rig)
        images = list(image) if isinstance(image, list | tuple) else [image]
        names = tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        height, width = self.check_inputs(
            images=images,
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_interval=guidance_interval,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            transparent=transparent,
        )
        shares = controlnet_conditioning_scale, control_guidance_start, control_guidance_end
        control = Control.of(self.controlnet, control_image, len(images), height, width, *shares)
        self._guidance_scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._guidance_interval, self._interrupt = guidance_interval, False

        # 2. Timesteps
        steps = config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        self._num_timesteps = len(self.scheduler.timesteps)

        # 3. Encode the condition
        prompt_embeds = self.prepare_context(
            [composite_on_grey(image) for image in images],
            checks.as_texts(prompt, len(images)) if prompt_embeds is None else prompt_embeds,
            checks.as_texts(negative_prompt, len(images)) if negative_prompt_embeds is None else negative_prompt_embeds,
            num_images_per_prompt,
            (cross_attention_kwargs or {}).get("scale", 1.0),
        )
        reference_latents = self.prepare_reference(images, num_images_per_prompt, generator).to(prompt_embeds.dtype)

        # 4. Initial latents, and control pictures for them
        batch = len(images) * num_images_per_prompt
        latents = self.prepare_latents(batch, height, width, generator, latents)
        control.prepare(latents, num_images_per_prompt)

        # 5. Denoise
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        labels = torch.tensor([self.rigs.index(rig)], device=latents.device)  # ignored by a UNet without classes
        options = {"cross_attention_kwargs": cross_attention_kwargs, "class_labels": labels}
        tile = (ROWS, COLUMNS) if config.tile_positions else None
        with reference_attention(self.unet, tile) as passes, self.progress_bar(total=self.num_timesteps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                told = prompt_embeds, reference_latents
                prediction = self.predict(passes, latents, step, *told, generator, control, **options)
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]
                tensors = {"latents": latents, "prompt_embeds": prompt_embeds, "reference_latents": reference_latents}
                tensors = end_step(self, callback_on_step_end, names, step, timestep, tensors)
                latents, prompt_embeds, reference_latents = tensors.values()
                if prompt_embeds is not told[0] or reference_latents is not told[1]:
                    passes.tokens.clear()  # read the reference anew
                progress.update()

        # 6. Decode
        latents = unscale_latents(latents)
        if output_type == "latent":
            tiles, views = latents, None
        else:
            decoded = self.decode_latents(latents)
            tiles = self.image_processor.postprocess(decoded[:, :3], output_type=output_type)
            views = split_tiles(tiles)
            views = [Views(six, rig) for six in views] if output_type == "pil" else views
            views = self.cut_out(views, decoded) if transparent else views
        self.maybe_free_model_hooks()
        return MultiViewTilePipelineOutput(tiles, views) if return_dict else (tiles, views)
