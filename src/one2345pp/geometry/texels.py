"""Which texels a triangle covers. What is done with them lives in `atlas` and `projection`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


CHUNK = 1_000_000  # texels tested against faces at once


def covered_texels(
    corners: np.ndarray,  # [F, 3, 2] pixels, texel centres at integers
    texture_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pieces of all pairs of a texel and a face within whose bounds its centre lies.

    Yields:
        Flat texel `[P]`, face `[P]`, and the centre's least barycentric coordinate `[P]`, negative outside. Faces ascend.
    """
    origin, edges = corners[:, 0], corners[:, 1:] - corners[:, :1]  # pixel = origin + (b1, b2) @ edges
    determinant = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    scale = 1 / np.where(determinant == 0, np.inf, determinant)
    to_b1 = np.stack([edges[:, 1, 1], -edges[:, 1, 0]], -1) * scale[:, None]
    to_b2 = np.stack([-edges[:, 0, 1], edges[:, 0, 0]], -1) * scale[:, None]
    low = np.ceil(corners.min(1)).astype(np.int64).clip(0, texture_size - 1)
    extent = np.maximum(np.floor(corners.max(1)).astype(np.int64).clip(0, texture_size - 1) - low + 1, 0)
    extent[determinant == 0] = 0
    counts = extent.prod(1)
    for faces in np.split(np.arange(len(corners)), np.flatnonzero(np.diff(np.cumsum(counts) // CHUNK)) + 1):
        face = np.repeat(faces, counts[faces])
        offset = np.arange(len(face)) - np.repeat(np.cumsum(counts[faces]) - counts[faces], counts[faces])
        row, column = np.divmod(offset, extent[face, 0])
        x, y = low[face, 0] + column, low[face, 1] + row
        dx, dy = x - origin[face, 0], y - origin[face, 1]
        b1 = to_b1[face, 0] * dx + to_b1[face, 1] * dy
        b2 = to_b2[face, 0] * dx + to_b2[face, 1] * dy
        yield y * texture_size + x, face, np.minimum(np.minimum(b1, b2), 1 - b1 - b2)
