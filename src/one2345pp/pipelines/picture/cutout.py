"""Cutting an object out of a plain background by colour: the background, its soft shadows, alpha and colours of the edge."""

# H W pixels. Distances between colours are the largest difference of a channel, 0..255.

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage


def plain_background(
    rgb: np.ndarray,  # [H, W, 3] 0..255
    share: float = 0.7,
    tolerance: float = 18.0,
) -> tuple[np.ndarray, float] | None:
    """A plain background, told from the picture's border: one colour that may drift linearly across the picture.

    Returns:
        The background `[H, W, 3]` and the noise about it, or `None` if less than `share` of the border is within `tolerance`.
    """
    height, width = rgb.shape[:2]
    y, x = np.meshgrid(
        np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32), indexing="ij"
    )
    band = max(2, min(height, width) // 100)
    border = np.ones((height, width), bool)
    border[band:-band, band:-band] = False
    plane = np.stack([np.ones_like(x), x, y], -1)  # [H, W, 3]
    design, colors = plane[border], rgb[border]
    near = np.abs(colors - np.median(colors, 0)).max(-1) < 2.5 * tolerance
    for _ in range(3):  # refit without what does not belong: the object may touch the border
        if near.mean() < share:
            return None
        fit = np.linalg.lstsq(design[near], colors[near], rcond=None)[0]
        residual = np.abs(colors - design @ fit).max(-1)
        near = residual < tolerance
    if near.mean() < share:
        return None
    return (plane @ fit).astype(np.float32), float(np.percentile(residual[near], 95))


def key(
    rgb: np.ndarray,  # [H, W, 3] 0..255
    background: np.ndarray,  # [H, W, 3] 0..255
    noise: float,
    shadows: bool = False,
) -> Image.Image:
    """Alpha from the distance to a known background, and the colours freed of it.

    Enclosed patches of exactly the background's colour are holes (in a handle, between the legs of a chair), unless they make
    up most of the silhouette: then it is a drawing or an object of that colour.

    Args:
        noise: How far the background's pixels are from it.
        shadows: Take soft shadows for background, see `find_shadows`.
    """
    distance = np.abs(rgb - background).max(-1)
    empty = distance <= max(6.0, 1.5 * noise)
    outside = _reaches_border(empty)
    if shadows:
        shadow, light = find_shadows(rgb, background, outside)
        background = background * light[..., None]
        distance = np.abs(rgb - background).max(-1)
        outside |= shadow
    enclosed = empty & ~outside
    if enclosed.sum() < 0.4 * (~outside).sum():
        labels, count = ndimage.label(enclosed)
        parts = np.arange(1, count + 1)
        level = ndimage.median(distance, labels, parts) if count else np.empty(0)
        area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        hole = (np.asarray(level) <= max(2.0, 0.75 * noise)) & (area >= max(6, 2e-4 * empty.size))
        outside |= np.isin(labels, parts[hole])
    # A pixel that is half object is half as far from the background as the object beside it.
    edge = ndimage.binary_dilation(outside, np.ones((3, 3)), iterations=2) & ~outside
    full = ndimage.maximum_filter(np.where(outside, 0, distance), size=5)
    alpha = np.where(outside, 0.0, np.where(edge, np.clip(distance / np.maximum(full, 1e-3), 0, 1), 1.0))
    cover = np.maximum(alpha, 0.1)[..., None]
    colors = np.where(edge[..., None], (rgb - (1 - cover) * background) / cover, rgb)
    rgba = np.concatenate([np.clip(colors, 0, 255), 255 * alpha[..., None]], -1)
    return Image.fromarray(np.round(rgba).astype(np.uint8))


def find_shadows(
    rgb: np.ndarray,  # [H, W, 3] 0..255
    background: np.ndarray,  # [H, W, 3] 0..255
    outside: np.ndarray,  # [H, W] bool
    darkest: float = 0.3,
    tint: float = 0.12,
    slopes: tuple[float, float] = (0.008, 0.02),
    rim: float = 0.008,
) -> tuple[np.ndarray, np.ndarray]:
    """Soft shadows on a plain background: darker background that fades into the rest of it without an edge.

    A shadow scales all channels alike, and slowly from pixel to pixel; it is reached from outside without crossing an edge. That
    leaves a rim where the object begins, which is taken in as far as it is as dark as the shadow beside it. What would take most of
    the silhouette is no shadow but a soft object. Shadows seen through a hole stay.

    Args:
        outside: Background that is known already.
        darkest: Least share of the background's light.
        tint: Most that the channels' shares may differ.
        slopes: Change of the share from pixel to pixel (of a picture of 512) that is always smooth, and that never is. Between them
            an edge is what is steeper over one pixel than over three.
        rim: Width of the rim, of the picture's longer side.

    Returns:
        The shadow, `[H, W]` bool, and the share of the background's light at every pixel, `[H, W]`, 1 away from shadows.
    """
    side = max(rgb.shape[:2])
    pixel = max(1.0, side / 512)
    share = rgb / np.maximum(background, 1)
    light = share.mean(-1)
    alike = (light > darkest) & (share.max(-1) < 1.02) & (np.ptp(share, axis=-1) < tint)
    near, far = (pixel * ndimage.gaussian_gradient_magnitude(light, width * pixel) for width in (1, 3))
    smooth = (near < slopes[0]) | ((near < slopes[1]) & (near < 1.6 * far))
    labels, _ = ndimage.label(outside | (alike & smooth))
    reached = np.unique(labels[outside])
    shadow = np.isin(labels, reached[reached > 0]) & ~outside
    if not shadow.any():
        return shadow, np.ones_like(light)
    away, nearest = ndimage.distance_transform_edt(~shadow, return_indices=True)
    beside = np.where(away <= max(2.0, rim * side), light[tuple(nearest)], 1.0)
    shadow |= alike & ~outside & (np.abs(light - beside) < 0.06) & (beside < 1)
    if shadow.sum() > 0.6 * (~outside).sum():
        return np.zeros_like(shadow), np.ones_like(light)
    return shadow, np.where(shadow, light, beside).astype(np.float32)


def _reaches_border(
    empty: np.ndarray,  # [H, W] bool
) -> np.ndarray:
    """The part of `empty` that is connected to the picture's border by ways wider than a pixel or two."""
    wide = ndimage.binary_erosion(empty, border_value=1)
    labels, _ = ndimage.label(wide)
    frame = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return ndimage.binary_dilation(np.isin(labels, frame[frame > 0]), iterations=2, mask=empty)
