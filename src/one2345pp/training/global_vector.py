"""The global condition of the volume networks while they learn: the CLIP vector of the input picture, from a frozen encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class GlobalVector:
    """Image embedding of input pictures, or nothing when no encoder is given.

    Args:
        folder: Folder of a `CLIPVisionModelWithProjection`, or `None`.
    """

    def __init__(self, folder: str | None):
        self.encoder = None
        if folder is not None:
            from transformers import CLIPVisionModelWithProjection

            self.encoder = CLIPVisionModelWithProjection.from_pretrained(folder).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self,
        pictures: Tensor,  # [B, 4, S, S] straight alpha in [0, 1]
    ) -> Tensor | None:
        """`[B, G]`, unit variance a channel on average, or `None`."""
        if self.encoder is None:
            return None
        alpha = pictures[:, 3:]
        rgb = pictures[:, :3] * alpha + (1 - alpha) * (127 / 255)
        size = self.encoder.config.image_size
        rgb = F.interpolate(rgb, size=(size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        mean, std = rgb.new_tensor(CLIP_MEAN).view(3, 1, 1), rgb.new_tensor(CLIP_STD).view(3, 1, 1)
        embeds = self.encoder.to(pictures.device)((rgb - mean) / std).image_embeds
        return F.normalize(embeds, dim=-1) * embeds.shape[-1] ** 0.5

    def dropped(
        self,
        pictures: Tensor,  # [B, 4, S, S]
        keep: Tensor,  # [B]
        dropout: float,
        generator: torch.Generator,
    ) -> Tensor | None:
        """The vectors, zero where the whole condition is dropped and for a share `dropout` of the others."""
        vector = self(pictures)
        if vector is None:
            return None
        own = (torch.rand(len(keep), generator=generator) >= dropout).to(keep)
        return vector * (keep * own)[:, None]
