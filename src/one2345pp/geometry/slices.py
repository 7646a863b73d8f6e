"""Pictures of volumes: cuts through distance and colour side by side. What a volume is lives in `volume`."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .volume import SparseVolume


AXES = "xyz"
GAP = 4  # pixels
INSIDE, OUTSIDE, UNKNOWN = (0.16, 0.33, 0.66), (0.80, 0.28, 0.16), (0.82, 0.82, 0.82)


def render_slices(volume: SparseVolume, axis: str = "z", count: int = 8, size: int = 128) -> Image.Image:
    """Cuts across an axis, evenly spread over the active cells: signed distance above, colour below.

    Distance is blue inside, white at the surface and red outside; cells that hold nothing are grey. A cut is seen from the
    positive end of its axis: +Y is up, for cuts across y +Z is down.

    Args:
        volume: What to cut.
        axis: `"x"`, `"y"` or `"z"`.
        count: Number of cuts.
        size: Side of a cut in pixels.

    Raises:
        InputError: For another axis, fewer than one cut, or a volume without cells.
    """
    if axis not in AXES or len(axis) != 1:
        raise InputError(f"axis: got {axis!r}, expected 'x', 'y' or 'z'.")
    if count < 1:
        raise InputError(f"count: got {count}, expected at least 1.")
    if len(volume) == 0:
        raise InputError("volume: has no active cells, so there is nothing to draw.")
    volume, number = volume.to("cpu"), AXES.index(axis)
    layers = volume.coords[:, number]
    chosen = np.linspace(int(layers.min()), int(layers.max()), count).round().astype(int)
    sheet = Image.new("RGB", (count * (size + GAP) - GAP, 2 * size + GAP), "white")
    for column, layer in enumerate(chosen):
        on_layer = layers == int(layer)
        cells = volume.coords[on_layer]
        colors = (_shade(volume.sdf[on_layer] / volume.truncation), volume.colors[on_layer])
        for row, values in enumerate(colors):
            cut = _cut(cells, values, number, volume.resolution).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(cut, (column * (size + GAP), row * (size + GAP)))
    return sheet


def _shade(
    distance: Tensor,  # [N] in truncation distances
) -> Tensor:
    """Colours `[N, 3]` from white at 0 to `INSIDE` at -1 and `OUTSIDE` at 1."""
    far = torch.where(distance[:, None] < 0, torch.tensor(INSIDE), torch.tensor(OUTSIDE))
    return 1 + distance.float().abs().clamp(0, 1)[:, None] * (far - 1)


def _cut(cells: Tensor, values: Tensor, axis: int, resolution: int) -> Image.Image:
    """Colours of one layer's cells as a picture."""
    across, up = ((2, 1), (0, 2), (0, 1))[axis]
    picture = torch.tensor(UNKNOWN).repeat(resolution, resolution, 1)
    columns, rows = cells[:, across], cells[:, up]
    # From the positive end: looking along -x, +z is left; along -y, +z is down; along -z, +x is right.
    columns = resolution - 1 - columns if axis == 0 else columns
    rows = rows if axis == 1 else resolution - 1 - rows
    picture[rows, columns] = values.float().clamp(0, 1)
    return Image.fromarray((picture * 255).round().byte().numpy())
