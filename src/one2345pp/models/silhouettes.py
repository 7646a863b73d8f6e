"""How far a point is from the visual hull: distances to silhouettes, in images and at points. Consumed by the condition encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


BAND = 8  # pixels of the view: distances beyond it are cut
FINER = 2  # the outline is found between pixels, on an image this much larger


def silhouette_distance(
    alpha: Tensor,  # [..., S, S]
) -> Tensor:
    """Signed distance of every pixel to the outline, where `alpha` crosses zero.

    Args:
        alpha: Positive inside the object, negative outside.

    Returns:
        `[..., 2 S, 2 S]`, in pixels of the given image, positive outside, within +-`BAND`.
    """
    side = alpha.shape[-1]
    fine = F.interpolate(
        alpha.reshape(-1, 1, side, side).float(), scale_factor=FINER, mode="bilinear", align_corners=False
    )
    inside = fine > 0
    reach = BAND * FINER
    # the nearest pixel of the other kind is half a pixel beyond the outline
    outer, inner = (_nearest(mask, reach) for mask in (inside, ~inside))
    signed = torch.where(inside, 0.5 - inner, outer - 0.5) / FINER
    return signed.clamp(-BAND, BAND).reshape(*alpha.shape[:-2], FINER * side, FINER * side)


def _nearest(mask: Tensor, reach: int) -> Tensor:
    """Distance to the nearest true pixel, `[N, 1, S, S]`, at most `reach + 1`; separable: along rows, then along columns."""
    far = float((reach + 1) ** 2)
    squared = torch.where(mask, 0.0, far)
    for axis in (-1, -2):
        padded = F.pad(squared, (reach, reach, 0, 0) if axis == -1 else (0, 0, reach, reach), value=far)
        side = squared.shape[axis]
        best = torch.full_like(squared, far)
        for shift in range(-reach, reach + 1):
            best = torch.minimum(best, padded.narrow(axis, reach + shift, side) + shift * shift)
        squared = best
    return squared.sqrt()


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
