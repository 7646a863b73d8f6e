"""The tile of six views: its layout and its grey background, for pictures, arrays and tensors alike.

Source: Zero123++ section 2 (3 rows by 2 columns, row-major in the rig's order).
"""

# B tiles, h w pixels of a view

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError


ROWS, COLUMNS = 3, 2
BACKGROUND = (127, 127, 127)


def split_tile(tile: Image.Image) -> list[Image.Image]:
    """Cut a tile into its six views, row-major."""
    width, height = tile.width // COLUMNS, tile.height // ROWS
    corners = [(column * width, row * height) for row in range(ROWS) for column in range(COLUMNS)]
    return [tile.crop((x, y, x + width, y + height)) for x, y in corners]


def split_tiles(tiles: list[Image.Image] | np.ndarray | Tensor):
    """`split_tile` of a batch: lists of six PIL images, `[B, 6, h, w, 3]` (array) or `[B, 6, 3, h, w]` (tensor)."""
    if isinstance(tiles, torch.Tensor):
        return tiles.unflatten(3, (COLUMNS, -1)).unflatten(2, (ROWS, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    if isinstance(tiles, np.ndarray):
        return split_tiles(torch.from_numpy(tiles).movedim(-1, 1)).movedim(2, -1).numpy()
    return [split_tile(tile) for tile in tiles]


def join_views(
    views: Tensor,  # [..., 6, C, h, w]
) -> Tensor:
    """Views to tiles, `[..., C, 3 h, 2 w]`; `split_tiles` undoes it."""
    cells = views.unflatten(-4, (ROWS, COLUMNS))  # [..., rows, columns, C, h, w]
    return cells.movedim(-3, -5).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def make_tile(views: list[Image.Image]) -> Image.Image:
    """Six square views of one size as a tile; `split_tile` undoes it."""
    count, side = ROWS * COLUMNS, views[0].width if len(views) else 0
    if len(views) != count or any(view.size != (side, side) for view in views):
        sizes = ", ".join(f"{view.width}x{view.height}" for view in views)
        raise InputError(f"views: got {len(views)} ({sizes}), expected {count} square views of one size.")
    tile = Image.new(views[0].mode, (side * COLUMNS, side * ROWS))
    for index, view in enumerate(views):
        row, column = divmod(index, COLUMNS)
        tile.paste(view, (column * side, row * side))
    return tile


def composite_on_grey(image: Image.Image) -> Image.Image:
    """RGB picture with what is transparent replaced by grey 127; opaque pictures pass unchanged."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, BACKGROUND)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def remove_grey(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    """`RGBA` with straight alpha of a picture on the tile's grey and its mask (`L`); `composite_on_grey` undoes it."""
    cover = np.asarray(alpha, np.float32)[..., None] / 255
    colors = (np.asarray(picture, np.float32) - (1 - cover) * np.float32(BACKGROUND)) / np.maximum(cover, 0.1)
    colors = np.where(cover > 0, colors.clip(0, 255), 127).round().astype(np.uint8)
    return Image.merge("RGBA", (*Image.fromarray(colors).split(), alpha))
