"""How far a point is from the visual hull: distances to silhouettes, in images and at points. Consumed by the condition encoder."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor


BAND = 1 / 12  # of the view's side: distances beyond it are cut
FINER = 2  # the outline is found between pixels, on an image this much larger


def silhouette_distance(
    alpha: Tensor,  # [V, S, S]
) -> Tensor:
    """Signed distance of every pixel to the outline, where `alpha` crosses zero.

    Args:
        alpha: Positive inside the object, negative outside.

    Returns:
        `[V, 2 S, 2 S]`, in shares of the view's side, positive outside, within +-`BAND`.
    """
    fine = F.interpolate(alpha[:, None].float(), scale_factor=FINER, mode="bilinear", align_corners=False)[:, 0]
    signed = np.stack([_signed_distance(inside) for inside in (fine > 0).cpu().numpy()])
    return (torch.from_numpy(signed).to(fine) / fine.shape[-1]).clamp(-BAND, BAND)


def _signed_distance(
    inside: np.ndarray,  # [S, S] bool
) -> np.ndarray:
    """In pixels; the outline is half a pixel before the nearest pixel of the other kind. Without any, the side."""
    to_inside = ndimage.distance_transform_edt(~inside) if inside.any() else len(inside)
    to_outside = len(inside) if inside.all() else ndimage.distance_transform_edt(inside)
    return np.where(inside, 0.5 - to_outside, to_inside - 0.5)


def hull_distances(
    distances: Tensor,  # [V, P]
    present: Tensor,  # [V] bool
    count: int,
) -> Tensor:
    """The `count` largest distances over the views, `[P, count]`.

    The first is the distance to the visual hull, the second that to the hull when any one view may be wrong. With fewer views the last
    is repeated; with none all are 0.
    """
    seen = distances[present]
    if not len(seen):
        return distances.new_zeros(distances.shape[1], count)
    largest = seen.topk(min(count, len(seen)), dim=0).values
    return largest[torch.arange(count, device=largest.device).clamp(max=len(largest) - 1)].mT
