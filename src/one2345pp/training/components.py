"""The first stage's networks with new weights, or with those of another first stage. What they learn lives elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..errors import InputError
from ..pipelines.multiview.latents import IMAGE_SCALE
from .config import arguments_of, check_keys


def byte_tokenizer(max_length: int) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without merges: 256 bytes, 256 bytes that end a word, start and end of text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]  # GPT-2's names of bytes
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=max_length)


def build_vae(section: dict) -> AutoencoderKL:
    return AutoencoderKL.from_config(section)


def build_unet(section: dict) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(section)


def build_vision_encoder(section: dict) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**section))


def build_text_encoder(section: dict) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**section))


def build_scheduler(section: dict) -> SchedulerMixin:
    options = dict(section)
    return getattr(diffusers, options.pop("_class_name"))(**options)


def check_components(components: dict[str, dict]) -> None:
    """Raise `InputError` for keys that a component is not made with; its own class would pass them over."""
    scheduler = getattr(diffusers, str(components["scheduler"].get("_class_name")), None)
    if scheduler is None:
        raise InputError("config.components.scheduler: needs a _class_name, that of a scheduler of diffusers.")
    known = {
        "vae": arguments_of(AutoencoderKL),
        "unet": arguments_of(UNet2DConditionModel),
        "text_encoder": CLIPTextConfig().to_dict(),
        "vision_encoder": CLIPVisionConfig().to_dict(),
        "scheduler": [*arguments_of(scheduler), "_class_name"],
    }
    for name, section in components.items():
        check_keys(section, known[name], f"config.components.{name}")


def build_components(components: dict[str, dict], view_size: int, seed: int) -> dict:
    """Every component of the pipeline with new weights, from a section each; the text encoder stays as it is drawn here."""
    vision_size = components["vision_encoder"]["image_size"]
    extractor = {"resample": Image.Resampling.BICUBIC, "image_mean": [0.5] * 3}
    return {
        "vae": seeded(build_vae, components["vae"], seed),
        "unet": seeded(build_unet, components["unet"], seed),
        "text_encoder": seeded(build_text_encoder, components["text_encoder"], seed).eval(),
        "vision_encoder": seeded(build_vision_encoder, components["vision_encoder"], seed).eval(),
        "tokenizer": byte_tokenizer(components["text_encoder"]["max_position_embeddings"]),
        "scheduler": build_scheduler(components["scheduler"]),
        "feature_extractor_clip": CLIPImageProcessor(
            size={"shortest_edge": vision_size}, crop_size=vision_size, image_std=[0.5] * 3, **extractor
        ),
        "feature_extractor_vae": CLIPImageProcessor(
            size={"shortest_edge": view_size}, crop_size=view_size, image_std=[0.5 / IMAGE_SCALE] * 3, **extractor
        ),
    }


def seeded(build: Callable[[dict], nn.Module], section: dict, seed: int) -> nn.Module:
    """`build(section)` with weights that the seed decides; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(section)


@torch.no_grad()
def start_from(folder: str | None, name: str, model: nn.Module) -> None:
    """Copy the weights of component `name` in `folder` into `model`, as far as they reach.

    New channels, the last, stay as drawn. Attention on a level that had none, and classes where there were none, add nothing at
    first, so the model begins as good as the other.
    """
    if folder is None:
        return
    trained = type(model).from_pretrained(folder, subfolder=name).state_dict()
    for key, weight in model.state_dict().items():
        if key in trained:
            common = tuple(slice(min(sizes)) for sizes in zip(weight.shape, trained[key].shape, strict=True))
            weight[common] = trained[key][common]
        elif ".proj_out." in key or key.startswith("class_embedding."):  # the last layer of what is new
            weight.zero_()
