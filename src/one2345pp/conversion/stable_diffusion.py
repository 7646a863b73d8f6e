"""Stable Diffusion 2 to a first stage that is ready to be trained: its weights, Zero123++'s noise, cameras and image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..pipelines.multiview.latents import IMAGE_SCALE
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline
from .folders import Folder, check_new, written_whole
from .ldm import CLASSES
from .weights import load_model, read_checkpoint_json, stored_dtype


# Zero123++ section 2.1: a linear schedule has more steps of much noise than Stable Diffusion's scaled linear one.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


def multiview_from_stable_diffusion(
    source: Path,
    vision_encoder: Path,
    output: Path,
    *,
    rig: str = "zero123plus-v1.2",
    view_size: int = 320,
    reference_size: int = 512,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder of a `MultiViewTilePipeline` that still has to be trained.

    Args:
        source: Stable Diffusion 2 in diffusers' form, with v-prediction.
        vision_encoder: CLIP with the projection (Zero123++ has ViT-H/14 of OpenCLIP), whole or its image half. Its pixels are as the
            `preprocessor_config.json` in it, or in a `feature_extractor` beside it, says; else as CLIP's.
        output: Folder to write.
        rig: Name of the cameras it is to be trained for.
        view_size: Side of a view in pixels.
        reference_size: Side of the input image as the tile attends to it.
        dtype: Of the stored weights; as in the sources when not given.
    """
    check_new(output)
    folder = Folder.open(source, **CLASSES, tokenizer="CLIPTokenizer")
    tokenizer = _tokenizer(folder.path / "tokenizer")
    vision_config = _vision_config(Path(vision_encoder))
    configs = {name: folder.empty(name).config for name in CLASSES}
    _check_schedule(folder.path)
    _check_networks(folder.path, configs, tokenizer)
    _check_vision(Path(vision_encoder), vision_config, configs["text_encoder"].hidden_size)
    _check_sizes(configs["vae"], rig, view_size, reference_size)
    for path in (*(folder.path / name for name in CLASSES), Path(vision_encoder)):
        stored_dtype(path)  # know what is not there before much is read
    length = tokenizer.model_max_length
    pipeline = MultiViewTilePipeline(
        **{name: folder.load(name, dtype) for name in CLASSES},
        tokenizer=tokenizer,
        scheduler=EulerAncestralDiscreteScheduler(**SCHEDULE),
        vision_encoder=load_model(CLIPVisionModelWithProjection, vision_encoder, dtype, config=vision_config),
        feature_extractor_clip=_clip_extractor(Path(vision_encoder), vision_config.image_size),
        feature_extractor_vae=CLIPImageProcessor(
            **_square(reference_size),
            resample=Image.Resampling.BILINEAR,
            image_mean=[0.5] * 3,
            image_std=[0.5 / IMAGE_SCALE] * 3,
        ),
        ramping_coefficients=[i / length for i in range(length)],  # FlexDiffuse, as Zero123++ began
        view_size=view_size,
        rig=rig,
    )
    with written_whole(output) as partial:
        pipeline.save_pretrained(partial)


def _tokenizer(path: Path) -> CLIPTokenizer:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder. Complete the folder of Stable Diffusion.")
    try:
        return CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: does not load as CLIPTokenizer ({reason}). Complete the folder.") from error


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_schedule(path: Path) -> None:
    """Refuse a UNet that does not predict v."""
    kind = read_checkpoint_json(path / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if kind != "v_prediction":
        raise InputError(
            f"{path}: its scheduler says prediction_type {kind!r}, expected 'v_prediction'. Only a UNet that predicts v takes the "
            "linear schedule without training anew (Zero123++ section 2.1): pass stable-diffusion-2, not its base."
        )


def _check_networks(path: Path, configs: dict, tokenizer: CLIPTokenizer) -> None:
    """Refuse networks that do not fit each other, or that want more than a time and a text."""
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    facts = {
        "unet in_channels": (unet.in_channels, vae.latent_channels),
        "unet out_channels": (unet.out_channels, vae.latent_channels),
        "vae in_channels": (vae.in_channels, 3),
        "unet cross_attention_dim": (unet.cross_attention_dim, text.hidden_size),
        "unet class_embed_type": (unet.class_embed_type, None),
        "unet addition_embed_type": (unet.addition_embed_type, None),
        "tokenizer model_max_length": (tokenizer.model_max_length, text.max_position_embeddings),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            raise InputError(f"{path}: {name} is {found}, expected {expected}. Pass the folder of Stable Diffusion 2.")


def _check_vision(path: Path, config: CLIPVisionConfig, width: int) -> None:
    """The image's vector is added to the text's, so both have one width."""
    if config.projection_dim != width:
        raise InputError(
            f"{path}: projects images to {config.projection_dim} numbers, but the text encoder has width {width}. Pass a "
            f"CLIP with projection_dim {width}, such as ViT-H/14 for Stable Diffusion 2."
        )


def _check_sizes(vae: Any, rig: str, view_size: int, reference_size: int) -> None:
    """Known cameras, and pictures that the autoencoder can shrink."""
    if rig not in CameraRig.names():
        raise InputError(f"rig: got {rig!r}, expected one of {', '.join(CameraRig.names())}.")
    factor = 2 ** (len(vae.block_out_channels) - 1)
    for name, size in (("view size", view_size), ("reference size", reference_size)):
        if size < factor or size % factor:
            raise InputError(f"{name}: got {size}, expected a multiple of {factor}, by which the autoencoder shrinks.")


# --- the image encoder ----------------------------------------------------------------------------------------------


def _vision_config(path: Path) -> CLIPVisionConfig:
    """Of an image encoder alone, or of both halves of CLIP, where the projection is a fact of the whole."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder. Pass the folder of a CLIP with its config.json and weights.")
    config = read_checkpoint_json(path / "config.json")
    kind = config.get("model_type")
    if kind == "clip":
        config = {**config.get("vision_config", {}), "projection_dim": config.get("projection_dim", 512)}
    elif kind != "clip_vision_model":
        raise InputError(f"{path}: its config.json says model_type {kind!r}, expected 'clip' or 'clip_vision_model'.")
    return CLIPVisionConfig.from_dict(config)


def _clip_extractor(path: Path, size: int) -> CLIPImageProcessor:
    """Pixels as the image encoder knows them."""
    settings = {"resample": Image.Resampling.BICUBIC, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    for place in (path, path.parent / "feature_extractor_clip", path.parent / "feature_extractor"):
        if (place / "preprocessor_config.json").is_file():
            found = read_checkpoint_json(place / "preprocessor_config.json")
            settings = {name: found.get(name, default) for name, default in settings.items()}
            break
    return CLIPImageProcessor(**_square(size), **settings)


def _square(size: int) -> dict:
    return {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
