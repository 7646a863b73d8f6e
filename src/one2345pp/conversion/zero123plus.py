"""A tile UNet that was published alone, put into the folder of a first stage. Whole Zero123++ folders load as they stand."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import LDM_UNET_KEY
from torch import Tensor

from ..errors import InputError
from .folders import Folder, check_new
from .weights import fill, read_tensors, weight_files


logger = logging.getLogger(__name__)

# A ControlNet has no last convolution, an autoencoder no time.
MARKS = ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight")


def folder_with_unet(unet: Path, into: Path, output: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a first stage with another UNet; all else is as it was, but for a model card, which is not copied.

    Args:
        unet: `.safetensors`, `.bin` or `.ckpt` in diffusers' names, perhaps behind a prefix such as `unet.`; or a folder that has one.
        into: Folder of a first stage, or of a whole chain.
        output: Folder to write.
        dtype: Of all stored weights; as in the sources when not given.
    """
    check_new(output)
    base = Folder.open(into, unet="UNet2DConditionModel")
    model = base.empty("unet")
    models = {"unet": fill(model, unet_weights(_file_of(Path(unet))), str(unet), dtype)}
    base.write(models | base.others(models, dtype), output)


def unet_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a file by the names of a UNet, without what was in front of them; others are left out."""
    tensors = read_tensors(file)
    if any(key.startswith(LDM_UNET_KEY) for key in tensors):
        raise InputError(
            f"{file}: is in the original layout of Stable Diffusion ({LDM_UNET_KEY}*), expected diffusers' names. Convert a whole "
            "checkpoint with: one2345pp convert single-file"
        )
    prefixes = {key.removesuffix(MARKS[0]) for key in tensors if re.fullmatch(rf"(.+\.)?{MARKS[0]}", key)}
    prefixes = sorted(prefix for prefix in prefixes if all(prefix + mark in tensors for mark in MARKS))
    if not prefixes:
        raise InputError(
            f"{file}: has no UNet in diffusers' names, expected tensors such as conv_in.weight, perhaps behind a prefix. Pass the "
            "diffusion_pytorch_model file of a UNet."
        )
    if len(prefixes) > 1:
        raise InputError(
            f"{file}: has {len(prefixes)} UNets ({', '.join(map(repr, prefixes))}), expected one. Save the one alone."
        )
    if prefixes[0]:
        logger.info("%s: the UNet is behind %s", file, prefixes[0])
    return {key.removeprefix(prefixes[0]): tensor for key, tensor in tensors.items() if key.startswith(prefixes[0])}


def _file_of(path: Path) -> Path:
    """The one file of weights in a UNet's folder, or the file itself."""
    if not path.is_dir():
        return path
    files = weight_files(path) or weight_files(path / "unet")
    if len(files) != 1:
        raise InputError(f"{path}: has {len(files)} files of weights, expected one. Pass the file of a UNet.")
    return files[0]
