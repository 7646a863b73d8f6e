"""The ControlNets of stage 1: control pictures as pixels, how much each network weighs in each step, what it adds to the UNet."""

# B images, n tiles an image, H W pixels of a tile

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from PIL import Image
from torch import Tensor

from ...errors import InputError
from ...geometry.tile import composite_on_grey
from .checks import check_share, within


@dataclass
class Control:
    """What steers one call; without pictures it adds nothing."""

    network: ControlNetModel | MultiControlNetModel | None
    pictures: list[list[Image.Image]]  # a list a network, one picture an image
    scales: list[float]
    starts: list[float]
    ends: list[float]
    pixels: list[Tensor] = field(default_factory=list)  # of each network, [B * n, 3, H, W]

    @classmethod
    def of(cls, network, control_image: Any, number: int, height: int, width: int, scale, start, end) -> Control:
        """From the arguments of a call for `number` images: numbers for all networks, or lists with one for each.

        Args:
            control_image: For one network a picture, or a list of them, one an image; for several networks a list with that of each.

        Raises:
            InputError: If there is no network, or numbers, shapes or kinds do not fit.
        """
        count = len(_networks(network))
        named = {"controlnet_conditioning_scale": scale, "control_guidance_start": start, "control_guidance_end": end}
        scales, starts, ends = (_one_a_network(name, value, count) for name, value in named.items())
        for first, last in zip(starts, ends, strict=True):
            check_share("control_guidance_start, control_guidance_end", first, last)
        pictures = [] if control_image is None else _one_list_a_network(control_image, count, number)
        for picture in (picture for row in pictures for picture in row):
            if abs(picture.width * height - picture.height * width) > 0.01 * picture.height * width:
                raise InputError(
                    f"control_image: is {picture.width}x{picture.height} pixels, expected the shape of the tile, "
                    f"{width}x{height}: 3 rows by 2 columns of views."
                )
        return cls(network, pictures, scales, starts, ends)

    def prepare(self, latents: Tensor, repeats: int) -> None:
        """Turn the pictures to pixels, as large as each network needs for latents `[B * n, c, h, w]`, on their device."""
        self.pixels = []
        for row, network in zip(self.pictures, _networks(self.network), strict=False):  # no pictures, no pixels
            factor = 2 ** (len(network.config.conditioning_embedding_out_channels) - 1)
            height, width = (side * factor for side in latents.shape[-2:])
            self.pixels.append(control_pixels(row, height, width, repeats).to(latents.device, network.dtype))

    def scales_at(self, step: int, steps: int) -> list[float]:
        """The weight of each network at step `step` of `steps`: zero where it does not act."""
        return [
            scale if within(step, steps, start, end) else 0.0
            for scale, start, end in zip(self.scales, self.starts, self.ends, strict=True)
        ]

    def residuals(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        step: int,
        steps: int,
        class_labels: Tensor | None = None,
    ) -> dict[str, Any]:
        """Arguments of the UNet: what the networks add to it at this step; none where nothing acts.

        Args:
            sample: What the UNet's read pass sees, `[B * n, c, h, w]` or all branches of it; context as long.
            class_labels: Those of the UNet, for networks made of one that has some.
        """
        scales = self.scales_at(step, steps)
        if not self.pixels or not any(scales):
            return {}
        pixels = [tile.repeat(len(sample) // len(tile), 1, 1, 1) for tile in self.pixels]
        several = hasattr(self.network, "nets")
        down, mid = self.network(
            sample,
            timestep,
            encoder_hidden_states=context,
            controlnet_cond=pixels if several else pixels[0],
            conditioning_scale=scales if several else scales[0],
            class_labels=class_labels,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def control_pixels(pictures: list[Image.Image], height: int, width: int, repeats: int) -> Tensor:
    """Control pictures in [-1, 1], the range that the ControlNets of Zero123++ were trained in.

    Returns:
        `[B * n, 3, H, W]`.
    """
    sized = [
        picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BILINEAR)
        for picture in map(composite_on_grey, pictures)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in sized]))
    return (pixels.permute(0, 3, 1, 2) / 127.5 - 1).repeat_interleave(repeats, 0)


def _networks(network) -> list[ControlNetModel]:
    if network is None:
        return []
    return list(network.nets) if hasattr(network, "nets") else [network]  # by attribute: it may be compiled


def _one_a_network(name: str, value: float | list[float], count: int) -> list[float]:
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise InputError(f"{name}: got {len(values)} numbers, expected one, or a list of {count}, one a ControlNet.")
    return values


def _one_list_a_network(control_image: Any, count: int, number: int) -> list[list[Image.Image]]:
    if not count:
        raise InputError(
            "control_image: this pipeline has no ControlNet. Load one with from_pretrained(..., controlnet=...), "
            "or leave control_image out."
        )
    entries = list(control_image) if count > 1 and isinstance(control_image, list | tuple) else [control_image]
    if len(entries) != count:
        raise InputError(f"control_image: got {len(entries)}, expected a list of {count}, one a ControlNet.")
    rows = [list(entry) if isinstance(entry, list | tuple) else [entry] * number for entry in entries]
    for row in rows:
        if len(row) != number or not all(isinstance(picture, Image.Image) for picture in row):
            kinds = ", ".join(sorted({type(picture).__name__ for picture in row})) or "nothing"
            raise InputError(
                f"control_image: got {len(row)} ({kinds}), expected a PIL image, or a list of {number}, one an image."
            )
    return rows
