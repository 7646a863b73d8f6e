"""What a call of the stage 1 pipeline may be given. ControlNets check their own arguments, in `control`."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from ...errors import InputError
from ...geometry.tile import COLUMNS, ROWS
from ..checks import check_counts, check_generators


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_inputs(
    *,
    images: list[Image.Image],
    latent_shape: tuple[int, ...],
    context_width: int,
    num_images_per_prompt: int = 1,
    prompt: str | list[str] | None = "",
    negative_prompt: str | list[str] | None = None,
    num_inference_steps: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    output_type: str = "pil",
    transparent: bool = False,
) -> None:
    """Raise `InputError` for anything that a call for pictures and a tile of that shape could not use."""
    number = len(images)
    check_images(images)
    check_counts(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
    check_texts(number, **{name: as_texts(text, number) for name, text in texts.items()})
    check_embeds("prompt", prompt, prompt_embeds, (number, context_width))
    check_embeds("negative_prompt", negative_prompt, negative_prompt_embeds, (number, context_width))
    check_noise(latents, latent_shape, generator)
    check_output(output_type, transparent)
    check_share("guidance_interval", *guidance_interval)


# --- checks of one argument each ------------------------------------------------------------------------------------


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


def tile_size(height: int | None, width: int | None, view_size: int, factor: int) -> tuple[int, int]:
    """Height and width, by default of six views, of a tile that can be cut into views and that the VAE can shrink by `factor`."""
    height = ROWS * view_size if height is None else height
    width = COLUMNS * view_size if width is None else width
    for name, value, parts in (("height", height, ROWS), ("width", width, COLUMNS)):
        if value <= 0 or value % parts or value % factor:
            raise InputError(
                f"{name}: got {value}, expected a multiple of {parts} (views) and of {factor} (VAE). "
                f"{ROWS * view_size} high and {COLUMNS * view_size} wide is what the weights know."
            )
    return height, width


def check_rigs(rigs: list[str], unet: UNet2DConditionModel | None) -> None:
    """A class of the UNet for each rig, if there are several; of a UNet that was left out nothing is asked."""
    classes = len(rigs) if unet is None else unet.config.num_class_embeds
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


def check_noise(latents: Tensor | None, shape: tuple[int, ...], generator) -> None:
    """Latents of the tile's shape, and as many generators as there are tiles."""
    check_generators(generator, shape[0], "a tile")
    if latents is not None and tuple(latents.shape) != shape:
        raise InputError(f"latents: got shape {tuple(latents.shape)}, expected {shape}.")


def check_share(name: str, start: float, end: float) -> None:
    """The beginning and end of a share of the steps, as fractions."""
    if not 0 <= start <= end <= 1:
        raise InputError(f"{name}: got {start} to {end}, expected fractions of the steps, 0 <= start <= end <= 1.")


# --- shares of the steps --------------------------------------------------------------------------------------------


def within(step: int, steps: int, start: float, end: float) -> bool:
    """Whether step `step` of `steps` lies wholly in the share of them from `start` to `end` (fractions)."""
    return step / steps >= start and (step + 1) / steps <= end
