"""What the tile UNet of stage 1 is told: texts, how much of the image each token takes, and the pixels of the reference."""

# B images, L text tokens, D width of the text context

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from ...errors import InputError
from ...geometry.pictures import open_image
from ...geometry.tile import composite_on_grey
from ..picture.isolate import key_background
from .latents import IMAGE_SCALE


def encode_texts(
    text_encoder: CLIPTextModel | None,
    tokenizer: CLIPTokenizer | None,
    texts: list[str],  # [B]
    device: torch.device,
    lora_scale: float = 1.0,
) -> Tensor:
    """Context of `B` texts, `[B, L, D]`. Equal texts are encoded once."""
    if text_encoder is None or tokenizer is None:
        raise InputError("prompt: there is no text encoder. Pass prompt_embeds and negative_prompt_embeds instead.")
    unique = list(dict.fromkeys(texts))
    tokens = tokenizer(
        unique, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    if USE_PEFT_BACKEND:
        scale_lora_layers(text_encoder, lora_scale)
    try:
        context = text_encoder(tokens.input_ids.to(device))[0]
    finally:
        if USE_PEFT_BACKEND:
            unscale_lora_layers(text_encoder, lora_scale)
    return context[[unique.index(text) for text in texts]]


def encode_sides(sides: list[list[str] | Tensor], encode: Callable[[list[str]], Tensor]) -> list[Tensor]:
    """Contexts of branches, `[B, L, D]` each: what is encoded already stays as it is, and all texts are encoded at once."""
    texts = [text for side in sides if not isinstance(side, Tensor) for text in side]
    known = dict(zip(texts, encode(texts), strict=True)) if texts else {}
    return [side if isinstance(side, Tensor) else torch.stack([known[text] for text in side]) for side in sides]


def ramp(coefficients: list[float] | None, length: int) -> Tensor:
    """Share of the image feature in each of `length` text tokens, `[L, 1]`; `i / L` without coefficients (FlexDiffuse)."""
    values = [i / length for i in range(length)] if coefficients is None else coefficients
    if len(values) != length:
        raise InputError(f"ramping_coefficients: got {len(values)} numbers, expected {length}, one a text token.")
    return torch.tensor(values)[:, None]


def join_context(
    sides: list[Tensor],  # [B, L, D] each: of the negative branch, if there is one, and of the positive one
    images: Tensor,  # [B, 1, D]
    coefficients: list[float] | None,
) -> Tensor:
    """Contexts of all branches, `[len(sides) * B, L, D]`: text, and in the positive one ramp times image feature."""
    if len(lengths := {side.shape[1] for side in sides}) > 1:
        raise InputError(f"prompt_embeds, negative_prompt_embeds: got {sorted(lengths)} tokens, expected as many.")
    *negative, positive = sides
    shares = ramp(coefficients, positive.shape[1]).to(positive)
    return torch.cat([*negative, positive + shares * images.to(positive)])


def encode_reference(
    vae: AutoencoderKL,
    empty: Tensor | None,  # [1, 3, h, w], with guidance
    pixels: Tensor,  # [B, 3, h, w]
    repeats: int,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """Latents of `n` repeats of each picture, `[B * n, c, h, w]`; with guidance those of the empty picture first, as many."""
    if empty is None:
        branches = [vae.encode(pixels).latent_dist.parameters]
    else:
        moments = vae.encode(torch.cat([empty, pixels])).latent_dist.parameters
        branches = [moments[:1].expand(len(pixels), -1, -1, -1), moments[1:]]
    # Repeated before the draw, so that a list of generators holds one a tile.
    repeated = [branch.repeat_interleave(repeats, 0) for branch in branches]
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
