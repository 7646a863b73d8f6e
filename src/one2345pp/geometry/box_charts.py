"""A texture atlas that always comes out, and soon: six box projections, their connected pieces packed in shelves.

`atlas.unwrap` falls back to it. Axes: V vertices, F faces, C charts.
"""

from __future__ import annotations

import logging

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .texels import covered_texels


logger = logging.getLogger(__name__)

SMOOTHING = 8  # rounds of averaging normals with the neighbours' before each face picks its side of the box
STEEPEST = 0.25  # least cosine between a face's normal and its side's; a flat patch is stretched 4 times at most
ROUNDS = 4  # of taking apart what overlaps in a projection


def project_charts(
    vertices: np.ndarray,  # [V, 3]
    faces: np.ndarray,  # [F, 3]
    texture_size: int,
    padding: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a mesh into charts, each seen from one side of the box, so that no two faces share a texel.

    Args:
        texture_size: Side of the texture; overlaps too small to cover a texel's centre stay.
        padding: Texels between charts. If there are so many charts that half of the texture would be padding, it is less, and
            the log says so.

    Returns:
        The vertex that each cut one stands for `[V']`, the faces in their order `[F, 3]`, and UVs `[V', 2]` in [0, 1].
    """
    neighbors = _neighbors(vertices, faces)
    side, depth, plane = _sides(vertices, faces, neighbors)
    layer = np.zeros(len(faces), np.int64)
    for attempt in range(ROUNDS + 1):
        same = neighbors[:, (side[neighbors[0]] == side[neighbors[1]]) & (layer[neighbors[0]] == layer[neighbors[1]])]
        graph = coo_matrix((np.ones(same.shape[1], bool), same), shape=[len(faces)] * 2)
        _, chart = connected_components(graph, directed=False)
        corners = _packed(plane, chart, texture_size, padding)
        buried = _buried(corners, depth, texture_size)
        if len(buried) == 0:
            break
        layer[buried] = layer[buried] + 1 if attempt < ROUNDS - 1 else len(faces) + buried  # in the end, one by one
    keys, corner, cut = np.unique(
        chart.repeat(3) * len(vertices) + faces.ravel(), return_index=True, return_inverse=True
    )
    uvs = corners.reshape(-1, 2)[corner] / texture_size
    return keys % len(vertices), cut.reshape(-1, 3), np.stack([uvs[:, 0], 1 - uvs[:, 1]], 1).clip(0, 1)


def _neighbors(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Pairs of faces that share an edge in space, `[2, pairs]`."""
    _, place = np.unique(vertices, axis=0, return_inverse=True)
    edges = np.sort(place.reshape(-1)[faces][:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1)
    order = np.lexsort(edges.T)
    same = (edges[order[1:]] == edges[order[:-1]]).all(1)
    return np.stack([order[:-1][same], order[1:][same]]) // 3


def _sides(vertices: np.ndarray, faces: np.ndarray, neighbors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each face's side of the box `[F]`, how far out it lies `[F]`, and its corners as seen from there, right and down `[F, 3, 2]`."""
    triangles = vertices[faces]
    doubled = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    own = doubled / np.maximum(np.linalg.norm(doubled, axis=1, keepdims=True), 1e-30)
    links = coo_matrix((np.ones(neighbors.shape[1]), neighbors), shape=[len(faces)] * 2)
    links = (links + links.T).tocsr()
    smooth = doubled
    for _ in range(SMOOTHING):
        smooth = smooth + links @ smooth
        smooth = smooth / max(np.abs(smooth).max(), 1e-30)
    seen = np.concatenate([own, -own], 1) > STEEPEST
    wanted = np.where(seen, np.concatenate([smooth, -smooth], 1), -np.inf)
    side = np.where(seen.any(1), wanted.argmax(1), 0)
    axis, sign = side % 3, np.where(side < 3, 1.0, -1.0)
    rows = np.arange(len(faces))
    right, up = triangles[rows, :, (axis + 1) % 3] * sign[:, None], triangles[rows, :, (axis + 2) % 3]
    return side, triangles[rows, :, axis].mean(1) * sign, np.stack([right, -up], -1)


def _packed(plane: np.ndarray, chart: np.ndarray, texture_size: int, padding: float) -> np.ndarray:
    """Corners `[F, 3, 2]` in texels: all charts at one scale, the largest for which they fit beside each other."""
    count = chart.max() + 1
    low, high = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    np.minimum.at(low, chart, plane.min(1))
    np.maximum.at(high, chart, plane.max(1))
    size, offset = high - low, plane - low[chart, None]
    tall = size[:, 1] > size[:, 0]
    lying = np.where(tall[:, None], size[:, ::-1], size)
    turned = np.stack([offset[..., 1], size[chart, 0][:, None] - offset[..., 0]], -1)  # by a quarter, not mirrored
    offset = np.where(tall[chart][:, None, None], turned, offset)
    order = np.argsort(-lying[:, 1], kind="stable")
    asked = padding
    while _shelves(np.full((count, 2), padding), texture_size)[1] > texture_size / 2:
        padding /= 2
    if padding < asked:
        logger.warning("unwrap: %d charts leave room for only %.2g texels between them.", count, padding)
    fits, too_large = 0.0, texture_size / max(lying.max(), 1e-30)
    for _ in range(30):
        scale = (fits + too_large) / 2
        sizes = lying[order] * scale + padding
        if sizes[:, 0].max() <= texture_size and _shelves(sizes, texture_size)[1] <= texture_size:
            fits = scale
        else:
            too_large = scale
    place = np.empty((count, 2))
    place[order] = _shelves(lying[order] * fits + padding, texture_size)[0] + padding / 2
    return place[chart, None] + offset * fits


def _shelves(
    sizes: np.ndarray,  # [C, 2] by falling height
    width: float,
) -> tuple[np.ndarray, float]:
    """Where rectangles go when laid side by side in rows, `[C, 2]`, and the height of all rows."""
    ends = np.concatenate([[0], np.cumsum(sizes[:, 0])])
    place, start, height = np.empty_like(sizes), 0, 0.0
    while start < len(sizes):
        stop = max(int(np.searchsorted(ends, ends[start] + width, "right")) - 1, start + 1)
        place[start:stop, 0] = ends[start:stop] - ends[start]
        place[start:stop, 1] = height
        height += sizes[start, 1]
        start = stop
    return place, height


def _buried(corners: np.ndarray, depth: np.ndarray, texture_size: int) -> np.ndarray:
    """Faces that have another one in front of them at a texel's centre, ascending."""
    hits = [
        (texel[inside], face[inside])
        for texel, face, nearest in covered_texels(corners - 0.5, texture_size)
        if (inside := nearest > 1e-6).any()
    ]
    if not hits:
        return np.zeros(0, np.int64)
    texel, face = (np.concatenate(part) for part in zip(*hits, strict=True))
    order = np.lexsort([face, -depth[face], texel])
    behind = order[1:][texel[order[1:]] == texel[order[:-1]]]
    return np.unique(face[behind])
