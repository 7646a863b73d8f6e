"""The global condition of the volume networks: a CLIP vector of the input picture, the same in training and inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ..geometry.tile import composite_on_grey


@torch.no_grad()
def global_vector(
    encoder: CLIPVisionModelWithProjection,
    extractor: CLIPImageProcessor,
    pictures: Sequence[Image.Image],
    device: torch.device | str,
) -> Tensor:
    """Vectors of input pictures, seen on the tile's grey.

    Args:
        encoder: Of images.
        extractor: Prepares pictures for it.
        pictures: `B` pictures, opaque or with straight alpha.
        device: Where the encoder computes.

    Returns:
        `[B, G]` float32, of length `sqrt(G)`: unit variance a channel on average.
    """
    pixels = extractor(images=[composite_on_grey(picture) for picture in pictures], return_tensors="pt").pixel_values
    embeds = encoder(pixels.to(device, encoder.dtype)).image_embeds
    return F.normalize(embeds.float(), dim=-1) * embeds.shape[-1] ** 0.5
