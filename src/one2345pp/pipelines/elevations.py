"""From how high each picture of a call to the chain looks, told or estimated."""

# B pictures

from __future__ import annotations

import logging
from numbers import Real

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..geometry.framing import frame_object
from ..models.elevation import ElevationEstimator


logger = logging.getLogger(__name__)


def check_elevation(elevation: float | list[float | None] | None, number: int) -> None:
    """Refuse what is not an elevation in degrees, or a list of `number` of them, of which `None` is not known."""
    several = isinstance(elevation, list | tuple)
    if several and len(elevation) != number:
        raise InputError(f"elevation: got {len(elevation)}, expected one, or a list of {number}, one an object.")
    for degrees in elevation if several else [elevation]:
        if degrees is not None and not (isinstance(degrees, Real) and -90 <= degrees <= 90):
            raise InputError(f"elevation: got {degrees!r}, expected degrees from -90 to 90.")


def find_elevations(
    estimator: ElevationEstimator | None,
    pictures: list[Image.Image],  # [B]
    elevation: float | list[float | None] | None,
    device: torch.device,
) -> list[float | None]:
    """Degrees above the horizon from which each picture looks: as told, else as the estimator finds, else `None`, not known.

    Args:
        estimator: If there is one, on `device`.
        pictures: `RGBA`, square.
        elevation: What the caller said, see `check_elevation`.
        device: Where to compute.
    """
    told = list(elevation) if isinstance(elevation, list | tuple) else [elevation] * len(pictures)
    unknown = [index for index, degrees in enumerate(told) if degrees is None]
    if estimator is None or not unknown:
        return told
    for index in unknown:  # one by one, so that a picture's does not depend on the others, not in the last bit
        framed = torch.from_numpy(np.array(frame_object(pictures[index], estimator.config.image_size)))
        degrees = estimator.estimate(framed[None].to(device).movedim(-1, 1).float() / 255).item()
        logger.info("picture %d: looks from about %.0f degrees above the horizon", index + 1, degrees)
        told[index] = degrees
    return told
