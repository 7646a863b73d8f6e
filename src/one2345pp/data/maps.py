"""Maps of views beside their colours, by name. A new one is an entry here, and a shading of `geometry.render` that draws it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Map:
    """One kind of map.

    Args:
        channels: 1 or 3.
        shading: What draws it, of `geometry.render.render`.
        mirror: What becomes of its values, `[..., C, S, S]` in [0, 1], when its picture is mirrored from left to right.
    """

    channels: int
    shading: str
    mirror: Callable[[Tensor], Tensor] = lambda values: values


def _turn_across(
    normals: Tensor,  # [..., 3, S, S] as (n + 1) / 2
) -> Tensor:
    """They point the other way across."""
    return torch.cat([1 - normals[..., :1, :, :], normals[..., 1:, :, :]], -3)


MAPS = {
    "normals": Map(3, "normal", _turn_across),  # in camera space, as (n + 1) / 2
}


def check_maps(names: Collection[str]) -> None:
    """Raise `InputError` for a name that is not in `MAPS`."""
    if unknown := sorted(set(names) - set(MAPS)):
        raise InputError(f"maps: got {', '.join(unknown)}, expected some of {', '.join(MAPS)}.")
