"""Stage 1 from nothing: an autoencoder, a vision encoder by contrast, then the UNet over cached latents, each with a time limit.

The loop lives in `training.loop`, what an image becomes in `pipelines.pipeline_multiview_tile`; full-size weights are not made here.
"""

# B samples, I input pictures a sample, c latent channels, h w latent grid, L text tokens, D width of the text context

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from ..errors import InputError
from ..models.attention_reference import reference_attention
from ..pipelines.pipeline_multiview_tile import (
    BACKGROUND,
    COLUMNS,
    IMAGE_SCALE,
    ROWS,
    MultiViewTilePipeline,
    composite_on_grey,
    scale_latents,
)
from .autoencoder_init import initialize_with_colors
from .components import build_components, build_vae, build_vision_encoder, seeded, start_from
from .loop import share_minutes, train
from .tiles import ImageDataset, LatentDataset, preview_examples, to_pil, to_pixels, to_tile


logger = logging.getLogger(__name__)

DEFAULTS = {
    "view_size": 64,
    "rig": "zero123plus-v1.2",
    "rigs": None,  # all rigs to learn, if there are more, see MultiViewTilePipeline
    "default_num_inference_steps": 20,
    "default_guidance_scale": 2.5,
    "kl_weight": 5e-5,
    "edge_weight": 0.5,  # of the L1 error of finite differences, beside that of pixels
    "temperature": 0.1,  # of the contrast
    "initial": None,  # folder of a trained first stage, or a whole chain, whose weights to start from
    "condition_dropout": 0.1,
    "clean_reference": False,  # show the reference without noise, see MultiViewTilePipeline
    "tile_positions": False,  # tell self-attention which view a token belongs to, see MultiViewTilePipeline
    "min_snr_gamma": None,
    "color_init": False,  # start the autoencoder such that it carries colours, see autoencoder_init
    "recolored_copies": 1,  # of each sample, with colour channels in another order
    "validation": None,  # folder of prepared samples to preview, those of training otherwise
    "seed": 0,
}


SCALARS = (  # of the pipeline's config
    "view_size",
    "rig",
    "rigs",
    "clean_reference",
    "tile_positions",
    "default_num_inference_steps",
    "default_guidance_scale",
    "ramping_coefficients",
)


def run(config: dict, *, data: Path, output: Path, device: str = "auto", minutes: float | None = None) -> None:
    """Train the whole stage, phase by phase; a phase whose result is in `output` is not repeated, a cut one goes on.

    Args:
        config: `components` (a config each), `phases` (`vae`, `vision`, `unet`: configs of `training.loop`) and keys of `DEFAULTS`.
        data: Folder of prepared samples; those that are there when a phase starts are used.
        output: Gets `vae/`, `vision_encoder/` and `pipeline/`, which `MultiViewTilePipeline.from_pretrained` loads.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        minutes: Time for the whole run; the phases' own limits are scaled to it.

    A config with a `base` goes on from another first stage instead, see `finetune`.

    Raises:
        InputError: If the config has unknown keys or lacks some, or phases have no minutes of which `minutes` could be made.
    """
    if "base" in config:
        from .finetune import finetune

        return finetune(config, data=Path(data), output=Path(output), device=device, minutes=minutes)
    unknown = set(config) - set(DEFAULTS) - {"components", "phases"}
    if unknown or "components" not in config or "phases" not in config:
        raise InputError(
            f"config: unknown keys {sorted(unknown)}, needs components and phases. Start from multiview-small.json."
        )
    config = {**DEFAULTS, **config}
    limits = share_minutes(config["phases"], minutes)
    output = Path(output)
    processes = PartialState(cpu=device == "cpu")  # one, unless a launcher has started several
    _train_encoders(config, limits, processes, data=data, output=output, device=device)
    components = build_components(config)
    components["vae"] = AutoencoderKL.from_pretrained(output / "vae")
    components["vision_encoder"] = CLIPVisionModelWithProjection.from_pretrained(output / "vision_encoder")
    pipeline = MultiViewTilePipeline(**components, **{key: config[key] for key in SCALARS if key in config})
    with processes.main_process_first():
        latents = LatentDataset(data, config, pipeline, output / "latents", processes.device)
    objective = DenoiserObjective(
        config, pipeline, latents.empty, preview_examples(config["validation"] or data, config)
    )
    train(objective, latents, config["phases"]["unet"], output, device=device, minutes=limits["unet"])


def _train_encoders(
    config: dict, limits: dict, processes: PartialState, *, data: Path, output: Path, device: str
) -> None:
    """The first two phases, which have all pictures in memory; they make `vae/` and `vision_encoder/` where these are missing."""
    if (output / "vae").exists() and (output / "vision_encoder").exists():
        return
    images, phases = ImageDataset(data, config), config["phases"]
    if not (output / "vae").exists():
        objective = AutoencoderObjective(config, images.frames.views)
        train(objective, images, phases["vae"], output / "vae-training", device=device, minutes=limits["vae"])
        vae = AutoencoderKL.from_pretrained(output / "vae-training" / "vae")  # the averaged weights
        standardize_latents(vae, images)
        _save_whole(vae, output / "vae", processes)
    if not (output / "vision_encoder").exists():
        objective = VisionObjective(config)
        train(objective, images, phases["vision"], output / "vision-training", device=device, minutes=limits["vision"])
        vision = CLIPVisionModelWithProjection.from_pretrained(output / "vision-training" / "vision_encoder")
        standardize_embeds(vision, images)
        _save_whole(vision, output / "vision_encoder", processes)


# --- phase 1: autoencoder ------------------------------------------------------------------------------------------


class AutoencoderObjective:
    """Pixels, their edges and a little KL, on single views and on whole tiles, as the pipeline uses both."""

    def __init__(self, config: dict, frames: Tensor):  # [F, 6], see `tiles.Frames`
        self.config, self.frames = config, frames
        self.vae = seeded(build_vae, config)
        if config["color_init"]:
            initialize_with_colors(self.vae)
        start_from(config["initial"], "vae", self.vae)
        self.vae.to(memory_format=torch.channels_last)  # faster on a CPU
        self.modules = nn.ModuleDict({"vae": self.vae})
        self._example: Tensor | None = None

    def collate(self, items: list[dict], generator: torch.Generator) -> dict[str, Tensor]:
        views = torch.stack([item["views"] for item in items])
        if torch.rand((), generator=generator) < 0.5:
            frame = int(torch.randint(len(self.frames), (), generator=generator))
            images = to_tile(views[:, self.frames[frame]])
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
        loss = pixel + 4 * square + self.config["edge_weight"] * edge + self.config["kl_weight"] * kl
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


# --- phase 2: vision encoder ---------------------------------------------------------------------------------------


class VisionObjective:
    """Tell objects apart: an input picture and a view of one object are close, against those of other objects (InfoNCE)."""

    def __init__(self, config: dict):
        self.config = config
        self.vision = seeded(build_vision_encoder, config)
        start_from(config["initial"], "vision_encoder", self.vision)
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
        logits = first @ second.T / self.config["temperature"]
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


# --- phase 3: UNet -------------------------------------------------------------------------------------------------


class DenoiserObjective:
    """v-prediction of the tile with reference attention, on latents that were encoded before.

    Source: Zero123++ section 2 (linear betas, scaled reference attention), condition dropout as in InstantMesh's recipe.
    """

    def __init__(self, config: dict, pipeline: MultiViewTilePipeline, empty: Tensor, examples: list):
        self.config, self.pipeline, self.empty, self.examples = config, pipeline, empty, examples
        start_from(config["initial"], "unet", pipeline.unet)
        pipeline.unet.to(memory_format=torch.channels_last)  # faster on a CPU
        self.modules = nn.ModuleDict({"unet": pipeline.unet})
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        with torch.no_grad():
            self.text = pipeline.encode_texts([""])  # [1, L, D]
        self.ramp = pipeline.ramp(self.text.shape[1])

    def collate(self, items: list[dict], generator: torch.Generator) -> dict[str, Tensor]:
        pick = torch.randint(len(items[0]["embeds"]), (len(items),), generator=generator)
        embeds = torch.stack([item["embeds"][i] for item, i in zip(items, pick, strict=True)]).float()
        dropped = torch.rand(len(items), generator=generator) < self.config["condition_dropout"]
        reference = self.collate_references(items, pick, dropped, generator)
        context = self.text + self.ramp * (embeds * ~dropped[:, None])[:, None]
        tile = torch.stack([item["tile"] for item in items]).float()
        return {
            "latents": scale_latents(tile * self.pipeline.vae.config.scaling_factor),
            "reference": reference,
            "context": context,
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
        if not self.config["clean_reference"]:
            reference_steps = timesteps
            noise = randn_tensor(reference.shape, generator, reference.device, reference.dtype)
            reference = scheduler.add_noise(reference, noise, timesteps)
        tile = (ROWS, COLUMNS) if self.config["tile_positions"] else None
        with reference_attention(self.pipeline.unet, tile) as passes:
            passes.write(reference, reference_steps, context, class_labels=labels)
            prediction = passes.read(noised, timesteps, context, class_labels=labels)
        target = scheduler.get_velocity(batch["latents"], batch["noise"], timesteps)
        error = (prediction - target).square().mean((1, 2, 3))
        if self.config["min_snr_gamma"] is None:
            return error.mean(), {}
        snr = compute_snr(scheduler, timesteps)
        return (error * snr.clamp(max=self.config["min_snr_gamma"]) / (snr + 1)).mean(), {"v_mse": error.mean().item()}

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """A row an example: the input, the tile that the pipeline draws, the true tile."""
        inputs, truths, rigs = zip(*self.examples, strict=True)
        device = modules["unet"].device
        pipeline = MultiViewTilePipeline(**{**self.pipeline.components, "unet": modules["unet"]}, **self._scalars())
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
        MultiViewTilePipeline(**components, **self._scalars()).save_pretrained(output / "pipeline")

    def _scalars(self) -> dict:
        return {key: self.pipeline.config[key] for key in SCALARS}


def _save_whole(model, folder: Path, processes: PartialState) -> None:
    """Write a component, one process for all, so that its folder exists only when it is whole."""
    if processes.is_main_process:
        partial = folder.with_name(folder.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        partial.rename(folder)
    processes.wait_for_everyone()
