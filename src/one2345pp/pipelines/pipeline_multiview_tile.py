"""Stage 1: one image to a tile of six views, the algorithm of Zero123++ on stock diffusers components.

Framing the object, cutting backgrounds and training live elsewhere.
"""

# B images, n tiles an image, c latent channels, h w latent grid, L text tokens, D width of the text context

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..errors import InputError
from ..models.attention_reference import reference_attention
from .hub import SelfContainedMixin
from .pipeline_output import MultiViewTilePipelineOutput


ROWS, COLUMNS = 3, 2
BACKGROUND = (127, 127, 127)
# Targets of the diffusion are images times 0.5 / 0.8 and latents moved to the statistics of natural images (Zero123++ code).
IMAGE_SCALE = 0.5 / 0.8
LATENT_SCALE, LATENT_SHIFT = 0.75, 0.22


def scale_latents(latents: Tensor) -> Tensor:
    """Latents of the VAE (times its scaling factor) to what the UNet learns."""
    return (latents - LATENT_SHIFT) * LATENT_SCALE


def unscale_latents(latents: Tensor) -> Tensor:
    """Inverse of `scale_latents`."""
    return latents / LATENT_SCALE + LATENT_SHIFT


def composite_on_grey(image: Image.Image) -> Image.Image:
    """RGB picture with what is transparent replaced by grey 127; opaque pictures pass unchanged."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, BACKGROUND)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


class MultiViewTilePipeline(SelfContainedMixin, DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    r"""Six consistent views of the object in one image, drawn as one tile of 3 rows and 2 columns.

    Folders of Zero123++ (v1.1, v1.2) load as they stand.

    Args:
        vae ([`AutoencoderKL`]): Images to latents and back.
        text_encoder ([`~transformers.CLIPTextModel`]): Context of the prompt (usually empty).
        tokenizer ([`~transformers.CLIPTokenizer`]): Tokens of the prompt.
        unet ([`UNet2DConditionModel`]): Denoiser of the tile, and by reference attention the reader of the input image.
        scheduler ([`SchedulerMixin`]): Any stock scheduler; it also noises the reference.
        vision_encoder ([`~transformers.CLIPVisionModelWithProjection`]): Global feature of the input image.
        feature_extractor_clip ([`~transformers.CLIPImageProcessor`]): Pixels for the vision encoder.
        feature_extractor_vae ([`~transformers.CLIPImageProcessor`]): Pixels for the reference latent.
        ramping_coefficients (`list[float]`, *optional*): Share of the image feature in each text token, `L` numbers;
            `i / L` when not given (FlexDiffuse).
        view_size (`int`, defaults to 320): Side of a view in pixels.
        rig (`str`, defaults to `"zero123plus-v1.2"`): Cameras that the weights were trained for.
        clean_reference (`bool`, defaults to `False`): For weights trained so, the reference is read once, without noise and at
            timestep 0. Zero123++ noises it like the tile, which in small latents hides outlines from the first steps.
        tile_positions (`bool`, defaults to `False`): For weights trained so, self-attention knows which view a token belongs to.
        default_num_inference_steps (`int`, defaults to 28), default_guidance_scale (`float`, defaults to 4.0): Used when a
            call does not say.
    """

    model_cpu_offload_seq = "text_encoder->vision_encoder->unet->vae"
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
        ramping_coefficients: list | None = None,
        view_size: int = 320,
        rig: str = "zero123plus-v1.2",
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
        )
        self.register_to_config(
            ramping_coefficients=ramping_coefficients,
            view_size=view_size,
            rig=rig,
            clean_reference=clean_reference,
            tile_positions=tile_positions,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # --- state of the running call ------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # --- steps of a call, in order ------------------------------------------------------------------------------

    def check_inputs(
        self, images, prompts, negative_prompts, height, width, latents, control_image, output_type, tensor_inputs
    ) -> None:
        """Raise `InputError` for anything the call could not use."""
        if control_image is not None:
            raise InputError("control_image: this pipeline has no ControlNet. Leave control_image out.")
        if not images or not all(isinstance(image, Image.Image) for image in images):
            kinds = ", ".join(sorted({type(image).__name__ for image in images})) or "nothing"
            raise InputError(
                f"image: got {kinds}, expected a PIL image or a list of PIL images. Open files with PIL.Image.open."
            )
        for name, texts in (("prompt", prompts), ("negative_prompt", negative_prompts)):
            if len(texts) != len(images) or not all(isinstance(text, str) for text in texts):
                raise InputError(
                    f"{name}: got {texts!r}, expected one string, or a list of {len(images)}, one an image."
                )
        for name, value, parts in (("height", height, ROWS), ("width", width, COLUMNS)):
            if value <= 0 or value % parts or value % self.vae_scale_factor:
                raise InputError(
                    f"{name}: got {value}, expected a multiple of {parts} (views) and of {self.vae_scale_factor} (VAE). "
                    f"{ROWS * self.config.view_size} high and {COLUMNS * self.config.view_size} wide is what the weights know."
                )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError(f"output_type: got {output_type!r}, expected 'pil', 'np', 'pt' or 'latent'.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise InputError(
                f"callback_on_step_end_tensor_inputs: got {unknown}, expected some of {self._callback_tensor_inputs}."
            )

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """Text context of `B` prompts, `[B, L, D]`."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0]

    def encode_image(self, images: list[Image.Image]) -> Tensor:
        """Global features of `B` opaque RGB images, `[B, 1, D]`."""
        pixels = self.feature_extractor_clip(images, return_tensors="pt").pixel_values
        pixels = pixels.to(self._execution_device, self.vision_encoder.dtype)
        return self.vision_encoder(pixels).image_embeds[:, None]

    def ramp(self, length: int) -> Tensor:
        """Share of the image feature in each of `length` text tokens, `[L, 1]`."""
        values = self.config.ramping_coefficients
        values = [i / length for i in range(length)] if values is None else values
        if len(values) != length:
            raise InputError(f"ramping_coefficients: got {len(values)} numbers, expected {length}, one a text token.")
        return torch.tensor(values)[:, None]

    def prepare_context(self, images, prompts, negative_prompts, num_images_per_prompt: int) -> Tensor:
        """Cross-attention context of every branch: text plus ramp times image feature; plain text in the negative one.

        Returns:
            `[B * n, L, D]`, or `[2 * B * n, L, D]` (negative first) with guidance.
        """
        text = self.encode_prompt(prompts)
        context = text + self.ramp(text.shape[1]).to(text) * self.encode_image(images).to(text)
        branches = [self.encode_prompt(negative_prompts), context] if self.do_classifier_free_guidance else [context]
        return torch.cat([branch.repeat_interleave(num_images_per_prompt, 0) for branch in branches])

    def prepare_reference(self, images: list[Image.Image], num_images_per_prompt: int, generator) -> Tensor:
        """Latents that the tile attends to, of every branch; the negative one is the latent of a grey image.

        They are not multiplied by the VAE's scaling factor: that is the "5x" scale of Zero123++ section 2.2.

        Returns:
            `[B * n, c, h, w]`, or `[2 * B * n, c, h, w]` (negative first) with guidance.
        """
        pixels = self.feature_extractor_vae(images, return_tensors="pt").pixel_values
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        branches = [pixels]
        if self.do_classifier_free_guidance:
            branches = [torch.zeros_like(pixels), pixels]
        return torch.cat([self._sample_posterior(branch, num_images_per_prompt, generator) for branch in branches])

    def _sample_posterior(self, pixels: Tensor, repeats: int, generator) -> Tensor:
        # Repeated before the draw, so that a list of generators holds one a tile.
        moments = self.vae.encode(pixels).latent_dist.parameters.repeat_interleave(repeats, 0)
        return DiagonalGaussianDistribution(moments).sample(generator)

    def prepare_latents(self, batch: int, height: int, width: int, dtype, generator, latents: Tensor | None) -> Tensor:
        """First latents, `[B * n, c, height / f, width / f]`, at the scheduler's first noise level."""
        factor = self.vae_scale_factor
        shape = (batch, self.unet.config.in_channels, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != batch:
            raise InputError(f"generator: got {len(generator)}, expected one, or a list of {batch}, one a tile.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents: got shape {tuple(latents.shape)}, expected {shape}.")
        return latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma

    def noise_reference(self, reference: Tensor, timestep: Tensor, generator) -> Tensor:
        """The reference at the noise level of this step, scaled as the UNet expects, with fresh noise for each branch."""
        branches = reference.chunk(2) if self.do_classifier_free_guidance else [reference]
        noise = torch.cat(
            [randn_tensor(b.shape, generator=generator, device=b.device, dtype=b.dtype) for b in branches]
        )
        noised = self.scheduler.add_noise(reference, noise, timestep.expand(len(reference)))
        return self.scheduler.scale_model_input(noised, timestep)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """VAE latents (times the scaling factor) to pixels in [-1, 1], `[B * n, 3, height, width]`."""
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0] / IMAGE_SCALE

    @staticmethod
    def split_views(tiles: list[Image.Image] | np.ndarray | Tensor):
        """Cut tiles into views: lists of six PIL images, `[B, 6, h, w, 3]` (array) or `[B, 6, 3, h, w]` (tensor)."""
        if isinstance(tiles, torch.Tensor):
            return tiles.unflatten(3, (COLUMNS, -1)).unflatten(2, (ROWS, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if isinstance(tiles, np.ndarray):
            batch, height, width, channels = tiles.shape
            cells = tiles.reshape(batch, ROWS, height // ROWS, COLUMNS, width // COLUMNS, channels)
            return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, *cells.shape[2:3], *cells.shape[4:])
        return [
            [
                tile.crop((x, y, x + tile.width // COLUMNS, y + tile.height // ROWS))
                for y in range(0, tile.height, tile.height // ROWS)
                for x in range(0, tile.width, tile.width // COLUMNS)
            ]
            for tile in tiles
        ]

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | list[Image.Image],
        prompt: str | list[str] = "",
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        control_image: Image.Image | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
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
            control_image: Not supported without a ControlNet.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (NHWC), `"pt"` (NCHW), both in [0, 1], or `"latent"`.
            return_dict (`bool`, defaults to `True`): Return an output class instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after each step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Tensors for the callback, `["latents"]` by default.
            cross_attention_kwargs (`dict`, *optional*): For the attention processors; `scale` is that of a LoRA.

        Returns:
            [`MultiViewTilePipelineOutput`]: tiles in `images`, their views in `views`.
        """
        # 1. Check inputs
        config = self.config
        images = list(image) if isinstance(image, list | tuple) else [image]
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negative_prompts = [negative_prompt] * len(images) if isinstance(negative_prompt, str) else negative_prompt
        height, width = height or ROWS * config.view_size, width or COLUMNS * config.view_size
        tensor_inputs = (
            ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        )
        self.check_inputs(
            images, prompts, negative_prompts, height, width, latents, control_image, output_type, tensor_inputs
        )
        self._guidance_scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._interrupt = False

        # 2. Encode the condition
        images = [composite_on_grey(image) for image in images]
        prompt_embeds = self.prepare_context(images, prompts, negative_prompts, num_images_per_prompt)
        reference_latents = self.prepare_reference(images, num_images_per_prompt, generator).to(prompt_embeds.dtype)

        # 3. Timesteps
        self.scheduler.set_timesteps(
            num_inference_steps or config.default_num_inference_steps, device=self._execution_device
        )
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)

        # 4. Initial latents
        batch = len(images) * num_images_per_prompt
        latents = self.prepare_latents(batch, height, width, prompt_embeds.dtype, generator, latents)

        # 5. Denoise
        step_kwargs = (
            {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        )
        kwargs = {"cross_attention_kwargs": cross_attention_kwargs}
        tile = (ROWS, COLUMNS) if self.config.tile_positions else None
        with reference_attention(self.unet, tile) as passes, self.progress_bar(total=len(timesteps)) as progress:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                sample = torch.cat([latents, latents]) if self.do_classifier_free_guidance else latents
                sample = self.scheduler.scale_model_input(sample, timestep)
                if not self.config.clean_reference:
                    reference = self.noise_reference(reference_latents, timestep, generator)
                    passes.write(reference, timestep, prompt_embeds, **kwargs)
                elif step == 0:
                    passes.write(reference_latents, torch.zeros_like(timestep), prompt_embeds, **kwargs)
                prediction = passes.read(sample, timestep, prompt_embeds, **kwargs)
                if self.do_classifier_free_guidance:
                    negative, positive = prediction.chunk(2)
                    prediction = negative + self.guidance_scale * (positive - negative)
                latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "reference_latents": reference_latents,
                    }
                    changed = (
                        callback_on_step_end(self, step, timestep, {name: tensors[name] for name in tensor_inputs})
                        or {}
                    )
                    latents = changed.get("latents", latents)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                    reference_latents = changed.get("reference_latents", reference_latents)
                progress.update()

        # 6. Decode
        latents = unscale_latents(latents)
        if output_type == "latent":
            tiles, views = latents, None
        else:
            tiles = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)
            views = self.split_views(tiles)
        self.maybe_free_model_hooks()
        return MultiViewTilePipelineOutput(tiles, views) if return_dict else (tiles, views)
