"""What the tile UNet of stage 1 is told: text and image by cross-attention, and the picture whose latent it refers to."""

# B images, n tiles an image, L text tokens, D width of the text context

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from ..errors import InputError
from .multiview_inputs import as_texts, check_texts
from .preprocess import key_background, open_image
from .tiles import IMAGE_SCALE, composite_on_grey


class ContextMixin:
    """Cross-attention context and reference latents, for a pipeline with the components of `MultiViewTilePipeline`."""

    # --- text and the picture as a whole ----------------------------------------------------------------------------

    def encode_prompt(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None, lora_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Text contexts of `B` prompts and of their negative ones (empty by default), `[B, L, D]` each: what a call takes as
        `prompt_embeds` and `negative_prompt_embeds`. Needs the text encoder and the tokenizer alone."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negative_prompts = as_texts(negative_prompt, len(prompts))
        check_texts(len(prompts), prompt=prompts, negative_prompt=negative_prompts)
        negative_prompt_embeds, prompt_embeds = self.encode_texts([*negative_prompts, *prompts], lora_scale).chunk(2)
        return prompt_embeds, negative_prompt_embeds

    def encode_texts(self, texts: list[str], lora_scale: float = 1.0) -> Tensor:
        """Context of `B` texts, `[B, L, D]`. Equal texts are encoded once."""
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError("prompt: there is no text encoder. Pass prompt_embeds and negative_prompt_embeds instead.")
        unique = list(dict.fromkeys(texts))
        tokens = self.tokenizer(
            unique,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        if USE_PEFT_BACKEND:
            scale_lora_layers(self.text_encoder, lora_scale)
        try:
            context = self.text_encoder(tokens.input_ids.to(self._execution_device))[0]
        finally:
            if USE_PEFT_BACKEND:
                unscale_lora_layers(self.text_encoder, lora_scale)
        return context[[unique.index(text) for text in texts]]

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

    def prepare_context(
        self,
        images: list[Image.Image],  # [B]
        prompts: list[str] | Tensor,  # [B] or [B, L, D]
        negative_prompts: list[str] | Tensor,  # [B] or [B, L, D]
        num_images_per_prompt: int,
        lora_scale: float = 1.0,
    ) -> Tensor:
        """Cross-attention context of every branch: text plus ramp times image feature; plain text in the negative one.

        Returns:
            `[B * n, L, D]`, or `[2 * B * n, L, D]` (negative first) with guidance.
        """
        sides = [negative_prompts, prompts] if self.do_classifier_free_guidance else [prompts]
        texts = [text for side in sides if not isinstance(side, Tensor) for text in side]
        encoded = iter(self.encode_texts(texts, lora_scale).split(len(images)) if texts else ())
        sides = [side if isinstance(side, Tensor) else next(encoded) for side in sides]
        if len(lengths := {side.shape[1] for side in sides}) > 1:
            raise InputError(f"prompt_embeds, negative_prompt_embeds: got {sorted(lengths)} tokens, expected as many.")
        sides = [side.to(self._execution_device, self.unet.dtype) for side in sides]
        sides[-1] = sides[-1] + self.ramp(sides[-1].shape[1]).to(sides[-1]) * self.encode_image(images).to(sides[-1])
        return torch.cat(sides).repeat_interleave(num_images_per_prompt, 0)

    # --- the picture ------------------------------------------------------------------------------------------------

    def prepare_pixels(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """What the VAE encodes: an empty picture `[1, 3, h, w]` and `B` pictures on grey; with masks if the VAE has four channels."""
        pixels = reference_pixels(images, self.feature_extractor_vae, self.draws_masks)
        return tuple(part.to(self._execution_device, self.vae.dtype) for part in pixels)

    def prepare_reference(self, images: list[Image.Image], num_images_per_prompt: int, generator) -> Tensor:
        """Latents that the tile attends to, of every branch; the negative one is the latent of an empty picture.

        They are not multiplied by the VAE's scaling factor: that is the "5x" scale of Zero123++ section 2.2.

        Returns:
            `[B * n, c, h, w]`, or `[2 * B * n, c, h, w]` (negative first) with guidance.
        """
        empty, pixels = self.prepare_pixels(images)
        if not self.do_classifier_free_guidance:
            branches = [self.vae.encode(pixels).latent_dist.parameters]
        else:
            moments = self.vae.encode(torch.cat([empty, pixels])).latent_dist.parameters
            branches = [moments[:1].expand(len(images), -1, -1, -1), moments[1:]]
        # Repeated before the draw, so that a list of generators holds one a tile.
        repeated = [branch.repeat_interleave(num_images_per_prompt, 0) for branch in branches]
        return torch.cat([DiagonalGaussianDistribution(branch).sample(generator) for branch in repeated])


def reference_pixels(images: list[Image.Image], extractor: CLIPImageProcessor, masks: bool) -> tuple[Tensor, Tensor]:
    """Pixels of an empty picture, `[1, 3, h, w]`, and of `B` pictures on grey, `[B, 3, h, w]`.

    Args:
        images: Any pictures; opaque ones are cut out by their grey for the masks.
        extractor: The `feature_extractor_vae`.
        masks: Add a fourth channel that is `-IMAGE_SCALE` outside the object and `IMAGE_SCALE` inside.
    """
    pixels = extractor([composite_on_grey(image) for image in images], return_tensors="pt").pixel_values
    empty = torch.zeros_like(pixels[:1])
    if not masks:
        return empty, pixels
    alphas = [key_background(open_image(image)).getchannel("A").convert("RGB") for image in images]
    pixels = torch.cat([pixels, extractor(alphas, return_tensors="pt").pixel_values[:, :1]], 1)
    return torch.cat([empty, torch.full_like(empty[:, :1], -IMAGE_SCALE)], 1), pixels
