"""The first stage's networks with new weights, or with those of another first stage. What they learn lives in `multiview`."""

from __future__ import annotations

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
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

from ..pipelines.pipeline_multiview_tile import IMAGE_SCALE


def byte_tokenizer(max_length: int) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without merges: 256 bytes, 256 bytes that end a word, start and end of text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]  # GPT-2's names of bytes
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=max_length)


def build_vae(config: dict) -> AutoencoderKL:
    return AutoencoderKL.from_config(config["components"]["vae"])


def build_unet(config: dict) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(config["components"]["unet"])


def build_vision_encoder(config: dict) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config["components"]["vision_encoder"]))


def build_text_encoder(config: dict) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**config["components"]["text_encoder"]))


def build_components(config: dict) -> dict:
    """Every component of the pipeline with new weights; the text encoder stays as it is drawn here."""
    size = config["view_size"]
    vision_size = config["components"]["vision_encoder"]["image_size"]
    text = config["components"]["text_encoder"]
    scheduler = dict(config["components"]["scheduler"])
    extractor = {"resample": Image.Resampling.BICUBIC, "image_mean": [0.5] * 3}
    return {
        "vae": seeded(build_vae, config),
        "unet": seeded(build_unet, config),
        "text_encoder": seeded(build_text_encoder, config).eval(),
        "vision_encoder": seeded(build_vision_encoder, config).eval(),
        "tokenizer": byte_tokenizer(text["max_position_embeddings"]),
        "scheduler": getattr(diffusers, scheduler.pop("_class_name"))(**scheduler),
        "feature_extractor_clip": CLIPImageProcessor(
            size={"shortest_edge": vision_size}, crop_size=vision_size, image_std=[0.5] * 3, **extractor
        ),
        "feature_extractor_vae": CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size=size, image_std=[0.5 / IMAGE_SCALE] * 3, **extractor
        ),
    }


def seeded(build, config: dict):
    """`build(config)` with weights that the config's seed decides; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(config["seed"])
        return build(config)


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
