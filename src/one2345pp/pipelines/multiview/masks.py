"""Views of decoded tiles without their grey. What the VAE is shown of masks lives in `context`, cutting out pictures in `picture`."""

# B tiles, H W pixels of a tile

from __future__ import annotations

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ...geometry.tile import remove_grey, split_tiles
from ...geometry.views import Views
from ..picture.isolate import key_background


def cut_out(views: list[Views], masks: Tensor | None) -> list[Views]:
    """The same views as `RGBA`.

    Args:
        views: Of `B` tiles, on grey.
        masks: `[B, 1, H, W]`, -1 outside the object and 1 inside; without them the background's colour tells the object.
    """
    if masks is None:
        return [one.map(key_background) for one in views]
    alphas = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(masks)))
    return [
        Views([remove_grey(view, alpha) for view, alpha in zip(one, own, strict=True)], one.rig)
        for one, own in zip(views, split_tiles(alphas), strict=True)
    ]
