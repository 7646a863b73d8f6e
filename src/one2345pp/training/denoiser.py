"""What the tile UNet learns, from nothing or from a base model. The runs live in `multiview` and `finetune`."""

# B samples, I input pictures a sample, c latent channels, h w latent grid, L text tokens, D width of the text context

from __future__ import annotations

import logging
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from ..geometry.tile import BACKGROUND, COLUMNS, ROWS, composite_on_grey
from ..models.attention_reference import reference_attention
from ..pipelines.multiview.context import join_context
from ..pipelines.multiview.latents import scale_latents
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline


logger = logging.getLogger(__name__)


def pipeline_settings() -> dict[str, Any]:
    """The pipeline's arguments that are not components, and their defaults; a training's config may have them, too."""
    _, names = MultiViewTilePipeline._get_signature_keys(MultiViewTilePipeline)
    parameters = signature(MultiViewTilePipeline).parameters
    return {name: parameters[name].default for name in names}


class DenoiserObjective:
    """v-prediction of the tile with reference attention, on latents that were encoded before.

    Args:
        pipeline: Whose UNet is trained; its other components make the condition.
        empty: The reference of an empty picture.
        examples: See `preview_examples`.
        condition_dropout: Share of samples that are shown the empty picture.
        min_snr_gamma: Limit of the weights of clean timesteps, `None` for no weights.

    Source: Zero123++ section 2 (linear betas, scaled reference attention), condition dropout as in InstantMesh's recipe.
    """

    def __init__(
        self,
        pipeline: MultiViewTilePipeline,
        empty: Tensor,  # [c, h', w']
        examples: list[tuple[Image.Image, Image.Image, str]],
        condition_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
    ):
        self.pipeline, self.empty, self.examples = pipeline, empty, examples
        self.condition_dropout, self.min_snr_gamma = condition_dropout, min_snr_gamma
        pipeline.unet.to(memory_format=torch.channels_last)  # faster on a CPU
        self.modules = nn.ModuleDict({"unet": pipeline.unet})
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        with torch.no_grad():
            self.text = pipeline.encode_texts([""])  # [1, L, D]

    def collate(self, items: list[dict], generator: torch.Generator) -> dict[str, Tensor]:
        pick = torch.randint(len(items[0]["embeds"]), (len(items),), generator=generator)
        embeds = torch.stack([item["embeds"][i] for item, i in zip(items, pick, strict=True)]).float()
        dropped = torch.rand(len(items), generator=generator) < self.condition_dropout
        reference = self.collate_references(items, pick, dropped, generator)
        seen = (embeds * ~dropped[:, None])[:, None]  # [B, 1, D]
        text = self.text.expand(len(items), -1, -1)
        tile = torch.stack([item["tile"] for item in items]).float()
        return {
            "latents": scale_latents(tile * self.pipeline.vae.config.scaling_factor),
            "reference": reference,
            "context": join_context([text], seen, self.pipeline.config.ramping_coefficients),
            "timesteps": torch.randint(
                self.noise_scheduler.config.num_train_timesteps, (len(items),), generator=generator
            ),
            "noise": torch.randn(tile.shape, generator=generator),
            "labels": torch.stack([item["label"] for item in items]),
        }

    def collate_references(self, items: list[dict], pick: Tensor, dropped: Tensor, generator) -> Tensor:
        """What shows the model each sample's input picture `pick [B]`, an empty one where `dropped [B]`: latents `[B, c, h', w']`."""
        reference = torch.stack([item["references"][i] for item, i in zip(items, pick, strict=True)]).float()
        reference[dropped] = self.empty
        return reference

    def encode_references(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """Latents of what `collate_references` made; they are it here."""
        return reference

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        scheduler, timesteps, context = self.noise_scheduler, batch["timesteps"], batch["context"]
        labels = batch["labels"]  # of rigs; a UNet without classes does not look at them
        noised = scheduler.add_noise(batch["latents"], batch["noise"], timesteps)
        reference = self.encode_references(batch["reference"], generator)
        reference_steps = torch.zeros_like(timesteps)
        if not self.pipeline.config.clean_reference:
            reference_steps = timesteps
            noise = randn_tensor(reference.shape, generator, reference.device, reference.dtype)
            reference = scheduler.add_noise(reference, noise, timesteps)
        tile = (ROWS, COLUMNS) if self.pipeline.config.tile_positions else None
        with reference_attention(self.pipeline.unet, tile) as passes:
            passes.write(reference, reference_steps, context, class_labels=labels)
            prediction = passes.read(noised, timesteps, context, class_labels=labels)
        target = scheduler.get_velocity(batch["latents"], batch["noise"], timesteps)
        error = (prediction - target).square().mean((1, 2, 3))
        if self.min_snr_gamma is None:
            return error.mean(), {}
        snr = compute_snr(scheduler, timesteps)
        return (error * snr.clamp(max=self.min_snr_gamma) / (snr + 1)).mean(), {"v_mse": error.mean().item()}

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """A row an example: the input, the tile that the pipeline draws, the true tile."""
        inputs, truths, rigs = zip(*self.examples, strict=True)
        device = modules["unet"].device
        pipeline = MultiViewTilePipeline(**{**self.pipeline.components, "unet": modules["unet"]}, **self._settings())
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        generator = torch.Generator().manual_seed(0)
        tiles = [pipeline(one, rig=rig, generator=generator).images[0] for one, rig in zip(inputs, rigs, strict=True)]
        width, height = tiles[0].size
        sheet = Image.new("RGB", (2 * width * len(tiles), height + inputs[0].height), BACKGROUND)
        errors = []
        for index, (picture, tile, truth) in enumerate(zip(inputs, tiles, truths, strict=True)):
            sheet.paste(composite_on_grey(picture), (2 * width * index, 0))
            sheet.paste(tile, (2 * width * index, picture.height))
            sheet.paste(truth, (2 * width * index + width, picture.height))
            errors.append(((np.asarray(tile, np.float32) - np.asarray(truth, np.float32)) / 255) ** 2)
        logger.info("%s: PSNR %.2f dB", path, np.mean([-10 * np.log10(error.mean()) for error in errors]))
        sheet.save(path)

    def save(self, modules: nn.ModuleDict, output: Path) -> None:
        """The whole pipeline, in `output/pipeline`."""
        components = {**self.pipeline.components, "unet": modules["unet"]}
        MultiViewTilePipeline(**components, **self._settings()).save_pretrained(output / "pipeline")

    def _settings(self) -> dict:
        return {key: self.pipeline.config[key] for key in pipeline_settings()}
