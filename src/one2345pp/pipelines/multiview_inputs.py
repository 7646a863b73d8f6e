"""What a call of the stage 1 pipeline may be given. ControlNets check their own arguments, in `control`."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .tiles import COLUMNS, ROWS


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


# --- checks ---------------------------------------------------------------------------------------------------------


def check_images(images: list) -> None:
    """Pictures that are open, and at least one."""
    if not images or not all(isinstance(image, Image.Image) for image in images):
        kinds = ", ".join(sorted({type(image).__name__ for image in images})) or "nothing"
        raise InputError(
            f"image: got {kinds}, expected a PIL image or a list of PIL images. Open files with PIL.Image.open."
        )


def check_texts(number: int, **texts: list) -> None:
    """One text an image."""
    for name, values in texts.items():
        if len(values) != number or not all(isinstance(text, str) for text in values):
            raise InputError(f"{name}: got {values!r}, expected one string, or a list of {number}, one an image.")


def as_texts(texts: str | list[str] | None, number: int) -> list[str]:
    """One text an image: a single one is for all of them, and none is empty."""
    return [texts or ""] * number if texts is None or isinstance(texts, str) else texts


def check_embeds(name: str, texts: str | list[str] | None, embeds: Tensor | None, shape: tuple[int, int]) -> None:
    """Encoded texts, one of `[L, D]` an image, instead of texts and not beside them; `shape` is the number of images and `D`."""
    if embeds is None:
        return
    if texts:
        raise InputError(f"{name}, {name}_embeds: got both, expected text or what `encode_prompt` made of it.")
    if embeds.ndim != 3 or (embeds.shape[0], embeds.shape[2]) != shape:
        raise InputError(
            f"{name}_embeds: got shape {tuple(embeds.shape)}, expected {shape[0]} (one an image), any number of tokens, "
            f"{shape[1]} (the UNet's cross_attention_dim)."
        )


def check_size(height: int, width: int, view_size: int, factor: int) -> None:
    """A tile that can be cut into views, and that the VAE can shrink by `factor`."""
    for name, value, parts in (("height", height, ROWS), ("width", width, COLUMNS)):
        if value <= 0 or value % parts or value % factor:
            raise InputError(
                f"{name}: got {value}, expected a multiple of {parts} (views) and of {factor} (VAE). "
                f"{ROWS * view_size} high and {COLUMNS * view_size} wide is what the weights know."
            )


def check_counts(**counts: int | None) -> None:
    """At least one of everything; `None` stands for a default."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name}: got {count}, expected at least 1.")


def check_rigs(rigs: list[str], classes: int | None) -> None:
    """A class of the UNet for each rig, if there are several."""
    if (classes or 1) != len(rigs):
        raise InputError(
            f"rigs: {', '.join(rigs)} need a UNet with num_class_embeds={len(rigs)}, this one has {classes}. "
            "Train one with a config whose rigs and num_class_embeds agree, see configs/multiview-small.json."
        )


def check_rig(rig: str, known: list[str]) -> None:
    """A rig that the weights know."""
    if rig not in known:
        raise InputError(f"rig: got {rig!r}, the weights know {' and '.join(known)}.")


def check_output(output_type: str, transparent: bool) -> None:
    """A known kind of output, and pictures where transparency is asked for."""
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type: got {output_type!r}, expected 'pil', 'np', 'pt' or 'latent'.")
    if transparent and output_type != "pil":
        raise InputError(f"transparent: needs output_type='pil', got {output_type!r}.")


def check_tensor_inputs(names: list[str], known: list[str]) -> None:
    """Names of tensors that a callback can get."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"callback_on_step_end_tensor_inputs: got {unknown}, expected some of {known}.")


def check_noise(latents: Tensor | None, shape: tuple[int, ...], generator) -> None:
    """Latents of the tile's shape, and as many generators as there are tiles."""
    check_generators(generator, shape[0], "a tile")
    if latents is not None and tuple(latents.shape) != shape:
        raise InputError(f"latents: got shape {tuple(latents.shape)}, expected {shape}.")


def check_generators(generator, number: int, each: str) -> None:
    """One source of random draws, or a list of one `each`."""
    several = isinstance(generator, list)
    if several and len(generator) != number:
        raise InputError(f"generator: got {len(generator)}, expected one, or a list of {number}, one {each}.")
    for one in generator if several else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise InputError(f"generator: got {type(one).__name__}, expected a torch.Generator, or a list of them.")


def check_share(name: str, start: float, end: float) -> None:
    """The beginning and end of a share of the steps, as fractions."""
    if not 0 <= start <= end <= 1:
        raise InputError(f"{name}: got {start} to {end}, expected fractions of the steps, 0 <= start <= end <= 1.")


# --- shares of the steps --------------------------------------------------------------------------------------------


def within(step: int, steps: int, start: float, end: float) -> bool:
    """Whether step `step` of `steps` lies wholly in the share of them from `start` to `end` (fractions)."""
    return step / steps >= start and (step + 1) / steps <= end
