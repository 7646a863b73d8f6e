"""The global condition of the volume networks while they learn: the CLIP vector of the input picture, from a frozen encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection


class GlobalVector:
    """Image embedding of input pictures, or nothing when no pipeline is given.

    Args:
        folder: Folder of a `MultiViewTilePipeline`, whose `vision_encoder` and `feature_extractor_clip` are used, or `None`.
    """

    def __init__(self, folder: str | None):
        self.encoder = None
        if folder is not None:
            load = {"pretrained_model_name_or_path": folder}
            self.encoder = CLIPVisionModelWithProjection.from_pretrained(**load, subfolder="vision_encoder")
            self.encoder.eval().requires_grad_(False)
            extractor = CLIPImageProcessor.from_pretrained(**load, subfolder="feature_extractor_clip")
            self.mean = torch.tensor(extractor.image_mean).view(3, 1, 1)
            self.std = torch.tensor(extractor.image_std).view(3, 1, 1)

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
        rgb = (rgb - self.mean.to(rgb)) / self.std.to(rgb)
        embeds = self.encoder.to(pictures.device)(rgb).image_embeds
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
