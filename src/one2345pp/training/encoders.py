"""The first two phases of stage 1 from nothing: its autoencoder, and its image encoder by contrast. The run lives in `multiview`."""

# B samples, c latent channels, D width of an embedding

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from ..geometry.tile import COLUMNS, ROWS, join_views
from ..pipelines.multiview.latents import IMAGE_SCALE
from .multiview_data import ImageDataset, to_pil, to_pixels


# --- the autoencoder --------------------------------------------------------------------------------------------------


class AutoencoderObjective:
    """Pixels, their edges and a little KL, on single views and on whole tiles, as the pipeline uses both."""

    def __init__(
        self,
        vae: AutoencoderKL,
        frames: Tensor,  # [F, 6], see `Frames`
        kl_weight: float = 5e-5,
        edge_weight: float = 0.5,
    ):
        self.frames, self.kl_weight, self.edge_weight = frames, kl_weight, edge_weight
        self.vae = vae.to(memory_format=torch.channels_last)  # faster on a CPU
        self.modules = nn.ModuleDict({"vae": self.vae})
        self._example: Tensor | None = None

    def collate(self, items: list[dict], generator: torch.Generator) -> dict[str, Tensor]:
        views = torch.stack([item["views"] for item in items])
        if torch.rand((), generator=generator) < 0.5:
            frame = int(torch.randint(len(self.frames), (), generator=generator))
            images = join_views(views[:, self.frames[frame]])
        else:
            pool = torch.cat([views, torch.stack([item["inputs"] for item in items])], 1)
            images = pool[:, torch.randperm(pool.shape[1], generator=generator)[: ROWS * COLUMNS]].flatten(0, 1)
        images = images[:, : self.vae.config.in_channels]
        self._example = images[:6]
        return {"images": to_pixels(images)}

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = batch["images"]
        posterior = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        decoded = self.vae.decode(posterior.sample(generator)).sample
        pixel = (decoded - images).abs().mean()
        edge = sum((decoded.diff(dim=axis) - images.diff(dim=axis)).abs().mean() for axis in (-1, -2))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        square = (decoded - images).square().mean()  # L1 alone is content with the median, which is the background
        loss = pixel + 4 * square + self.edge_weight * edge + self.kl_weight * kl
        mse = square.detach() / (2 * IMAGE_SCALE) ** 2
        return loss, {"pixel": pixel.item(), "kl": kl.item(), "psnr": -10 * mse.log10().item()}

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """Images above what the autoencoder makes of them."""
        if self._example is None:
            return
        vae = modules["vae"]
        images = to_pixels(self._example).to(vae.device)
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
        both = torch.cat([images, decoded], -2).cpu()[:, :3] / IMAGE_SCALE
        to_pil(((torch.cat(list(both), -1) + 1) * 127.5).round().clamp(0, 255).byte()).save(path)

    def save(self, modules: nn.ModuleDict, output: Path) -> None:
        modules["vae"].save_pretrained(output / "vae")


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, images: ImageDataset, count: int = 64) -> None:
    """Fold the mean and spread of each latent channel into the 1x1 convolutions beside the latents, in place.

    Afterwards a latent times `scaling_factor` has mean 0 and deviation 1, and the bare latent of the reference is 1 / 0.18215 times
    as large, as in Zero123++. What the autoencoder computes stays the same but for rounding.
    """
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    latents = torch.cat(
        [vae.encode(to_pixels(images[i]["views"][:6, : vae.config.in_channels])).latent_dist.mode() for i in chosen]
    )
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=1e-4)
    gain = 1 / (std * vae.config.scaling_factor)
    quant, post, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    # Before: z = mean. After: z' = (z - mean) * gain; the second half of quant_conv gives log variances.
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.bias[channels:] += 2 * gain.log()
    post.bias += torch.einsum("ocij,c->o", post.weight, mean)
    post.weight /= gain[None, :, None, None]


# --- the image encoder ------------------------------------------------------------------------------------------------


class VisionObjective:
    """Tell objects apart: an input picture and a view of one object are close, against those of other objects (InfoNCE)."""

    def __init__(self, vision: CLIPVisionModelWithProjection, temperature: float = 0.1):
        self.vision, self.temperature = vision, temperature
        self.modules = nn.ModuleDict({"vision": self.vision})

    def collate(self, items: list[dict], generator: torch.Generator) -> dict[str, Tensor]:
        pairs = []
        for key in ("inputs", "views"):
            pool = torch.stack([item[key] for item in items])
            pick = torch.randint(pool.shape[1], (len(items),), generator=generator)
            pairs.append(pool[torch.arange(len(items)), pick])
        order = torch.randperm(3, generator=generator)  # one order a batch, so that colours still tell objects apart
        return {
            "pairs": to_pixels(torch.cat(pairs)[:, :3][:, order], 1.0),
            "object": torch.stack([item["object"] for item in items]),
        }

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        size = self.vision.config.image_size
        pixels = F.interpolate(batch["pairs"], (size, size), mode="bicubic", antialias=True)
        first, second = F.normalize(self.vision(pixels).image_embeds, dim=-1).chunk(2)  # [B, D]
        logits = first @ second.T / self.temperature
        same = batch["object"][:, None] == batch["object"]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)  # other samples of the same object are no counterexamples
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"accuracy": (logits.argmax(1) == target).float().mean().item()}

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """Nothing to draw."""

    def save(self, modules: nn.ModuleDict, output: Path) -> None:
        modules["vision"].save_pretrained(output / "vision_encoder")


@torch.no_grad()
def standardize_embeds(vision: CLIPVisionModelWithProjection, images: ImageDataset, count: int = 64) -> None:
    """Scale the projection so that the numbers of an embedding have deviation 1, as those of the text context do."""
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    size = vision.config.image_size
    pixels = torch.cat([to_pixels(images[i]["inputs"][:, :3], 1.0) for i in chosen])
    embeds = vision(F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)).image_embeds
    vision.visual_projection.weight /= embeds.square().mean().sqrt().clamp(min=1e-6)
