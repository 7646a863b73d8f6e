"""What the tile UNet of stage 1 is told: text and image by cross-attention, and the picture whose latent it refers to."""

# B images, n tiles an image, L text tokens, D width of the text context

from __future__ import annotations

import torch
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from ..errors import InputError
from .preprocess import key_background, open_image
from .tiles import IMAGE_SCALE, composite_on_grey


class ContextMixin:
    """Cross-attention context of a pipeline with `tokenizer`, `text_encoder`, `feature_extractor_clip` and `vision_encoder`."""

    def encode_prompt(self, prompts: list[str], lora_scale: float = 1.0) -> Tensor:
        """Text context of `B` prompts, `[B, L, D]`. Equal prompts are encoded once."""
        texts = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            texts,
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
        return context[[texts.index(prompt) for prompt in prompts]]

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
        self, images, prompts, negative_prompts, num_images_per_prompt: int, lora_scale: float = 1.0
    ) -> Tensor:
        """Cross-attention context of every branch: text plus ramp times image feature; plain text in the negative one.

        Returns:
            `[B * n, L, D]`, or `[2 * B * n, L, D]` (negative first) with guidance.
        """
        negative = negative_prompts if self.do_classifier_free_guidance else []
        context = self.encode_prompt([*negative, *prompts], lora_scale)
        ramped = self.ramp(context.shape[1]).to(context) * self.encode_image(images).to(context)
        context = torch.cat([context[: len(negative)], context[len(negative) :] + ramped])
        return context.repeat_interleave(num_images_per_prompt, 0)


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
