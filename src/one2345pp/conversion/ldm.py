"""Key layouts of Stable Diffusion 2: diffusers' to the original one (LDM, "CompVis") and back. Files live in `single_file`.

The way back is diffusers' own code. The way there is written here, and every result is taken back and compared before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    LDM_UNET_KEY,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn

from ..errors import InputError


VAE_KEY, TEXT_KEY = "first_stage_model.", "cond_stage_model.model."
PREFIXES = {"unet": LDM_UNET_KEY, "vae": VAE_KEY, "text_encoder": TEXT_KEY}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def from_ldm(checkpoint: Mapping[str, Tensor], models: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Weights of the three networks under diffusers' names.

    Args:
        checkpoint: Tensors in the original layout; others are ignored.
        models: `unet`, `vae` and `text_encoder`; they need no weights.
    """
    check_layout(models)
    for name, prefix in PREFIXES.items():
        if not any(key.startswith(prefix) for key in checkpoint):
            first = any(key.startswith("cond_stage_model.transformer.") for key in checkpoint)
            hint = "Its text encoder is Stable Diffusion 1's. " if first else ""
            raise InputError(
                f"the checkpoint has no {name}: no tensor's name begins with {prefix}. {hint}Pass a whole checkpoint of Stable "
                "Diffusion 2 in its original layout."
            )
    text = convert_open_clip_checkpoint(models["text_encoder"], checkpoint, prefix=TEXT_KEY)
    if not hasattr(models["text_encoder"], "text_model"):  # transformers 5 has one level less
        text = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    return {
        "unet": convert_ldm_unet_checkpoint(checkpoint, models["unet"].config),
        "vae": convert_ldm_vae_checkpoint(checkpoint, models["vae"].config),
        "text_encoder": text,
    }


def to_ldm(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Weights of `unet`, `vae` and `text_encoder` under the original names.

    Raises:
        InputError: If diffusers' code would not make the same weights of the result: the architecture has parts that the original
            layout has no names for.
    """
    check_layout(models)
    weights = {name: models[name].state_dict() for name in PREFIXES}
    result = unet_to_ldm(weights["unet"], models["unet"].config.layers_per_block)
    result |= vae_to_ldm(weights["vae"], len(models["vae"].config.up_block_types))
    result |= text_to_ldm(weights["text_encoder"])
    for name, back in from_ldm(result, models).items():
        lost = [key for key, tensor in weights[name].items() if key not in back or not same(tensor, back[key])]
        lost += sorted(back.keys() - weights[name].keys())
        if lost:
            raise InputError(
                f"{name}: {len(lost)} tensors, such as {lost[0]}, have no place in the original layout of Stable Diffusion 2. Only "
                "networks of its architecture can be one file."
            )
    return result


def check_layout(models: Mapping[str, nn.Module]) -> None:
    """Refuse networks that diffusers' code cannot take for Stable Diffusion 2's."""
    layers = models["unet"].config.layers_per_block
    if not isinstance(layers, int):
        raise InputError(f"unet: layers_per_block is {layers}, expected one number, as Stable Diffusion 2 has.")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, or of one kind if they have no data."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_meta or b.is_meta or torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# --- one network each -----------------------------------------------------------------------------------------------


def unet_to_ldm(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The UNet. Input block 0 is the first convolution; every further block is one layer, or one change of size."""
    outer = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"] | {"class_embedding.weight": "label_emb.weight"}
    attended = {key.split(".")[1] for key in weights if key.startswith("up_blocks.") and ".attentions." in key}

    def rename(key: str) -> str:
        if key in outer:
            return outer[key]
        way, block, part, index, rest = _split(key)
        inner = _replace_head(rest, UNET_RESNET) if part == "resnets" else rest
        if way == "mid":
            return f"middle_block.{2 * index + (part == 'attentions')}.{inner}"
        start = block * (layers + 1)
        if part == "downsamplers":
            return f"input_blocks.{start + layers + 1}.0.{inner.replace('conv.', 'op.', 1)}"
        if part == "upsamplers":
            return f"output_blocks.{start + layers}.{1 + (str(block) in attended)}.{inner}"
        column = int(part == "attentions")
        if way == "down":
            return f"input_blocks.{start + index + 1}.{column}.{inner}"
        return f"output_blocks.{start + index}.{column}.{inner}"

    return {LDM_UNET_KEY + rename(key): tensor for key, tensor in weights.items()}


def vae_to_ldm(weights: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """The autoencoder. The decoder's blocks are counted from the output; attention is a 1x1 convolution."""
    outer = DIFFUSERS_TO_LDM_MAPPING["vae"]
    result = {}
    for key, tensor in weights.items():
        if key in outer:
            result[VAE_KEY + outer[key]] = tensor
            continue
        side, inner = key.split(".", 1)
        way, block, part, index, rest = _split(inner)
        if part == "attentions":
            name = f"mid.attn_{index + 1}.{_replace_head(rest, VAE_ATTENTION)}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        elif way == "mid":
            name = f"mid.block_{index + 1}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        else:
            level = blocks - 1 - block if way == "up" else block
            name = f"{way}.{level}.block.{index}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
            if part.endswith("samplers"):
                name = f"{way}.{level}.{part.removesuffix('rs')}.{rest}"
        result[f"{VAE_KEY}{side}.{name}"] = tensor
    return result


def text_to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder, OpenCLIP's: queries, keys and values are one matrix."""
    outer = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    result = {}
    for key, tensor in weights.items():
        full = "text_model." + key.removeprefix("text_model.")
        if full in outer:
            result[TEXT_KEY + outer[full]] = tensor
            continue
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", full)
        if layer is None:
            raise InputError(f"text_encoder: {key} has no place in the original layout of Stable Diffusion 2.")
        block, rest = f"{TEXT_KEY}transformer.resblocks.{layer[1]}.", layer[2]
        projection = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest)
        if projection is None:
            result[block + _replace_head(rest, TEXT_LAYER)] = tensor
        elif projection[1] == "q":
            parts = [weights[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            result[f"{block}attn.in_proj_{projection[2]}"] = torch.cat(parts)
    return result


def _split(key: str) -> tuple[str, int, str, int, str]:
    """`down_blocks.1.resnets.0.conv1.weight` to its parts; a middle block is number 0."""
    match = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.([a-z]+)\.(\d+)\.(.+)", key)
    if match is None:
        raise InputError(
            f"{key}: has no place in the original layout. Only networks of Stable Diffusion 2 can be one file."
        )
    return match[1], int(match[2] or 0), match[3], int(match[4]), match[5]


def _replace_head(rest: str, names: Mapping[str, str]) -> str:
    head, last = rest.rsplit(".", 1)
    return f"{names.get(head, head)}.{last}"
