"""Stage 1 from nothing: an autoencoder, a vision encoder by contrast, then the UNet over cached latents, each with a time limit.

What each phase learns lives in `encoders` and `denoiser`, the loop in `loop`; full-size weights are not made here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from diffusers import AutoencoderKL
from transformers import CLIPVisionModelWithProjection

from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline
from .autoencoder_init import initialize_with_colors
from .components import build_components, build_vae, build_vision_encoder, check_components, seeded, start_from
from .config import read
from .denoiser import DenoiserObjective, pipeline_settings
from .encoders import AutoencoderObjective, VisionObjective, standardize_embeds, standardize_latents
from .finetune import finetune
from .loop import LoopSettings, share_minutes, train
from .multiview_data import ImageDataset, LatentDataset, preview_examples


@dataclass(frozen=True)
class Components:
    """A section for each component that has weights, or is a scheduler (with its `_class_name`)."""

    vae: dict
    unet: dict
    text_encoder: dict
    vision_encoder: dict
    scheduler: dict


@dataclass(frozen=True)
class Phases:
    """How long and how fast each network is trained."""

    vae: LoopSettings
    vision: LoopSettings
    unet: LoopSettings


@dataclass(frozen=True)
class MultiviewConfig:
    """A config of stage 1 from nothing, beside the settings of the pipeline that it becomes."""

    components: Components
    phases: Phases
    kl_weight: float = 5e-5
    edge_weight: float = 0.5  # of the L1 error of finite differences, beside that of pixels
    temperature: float = 0.1  # of the contrast
    initial: str | None = None  # folder of a trained first stage, or a whole chain, whose weights to start from
    condition_dropout: float = 0.1
    min_snr_gamma: float | None = None
    color_init: bool = False  # start the autoencoder such that it carries colours, see autoencoder_init
    recolored_copies: int = 0  # of each sample, with colour channels in another order
    validation: str | None = None  # folder of prepared samples to preview, those of training otherwise
    seed: int = 0


def run(config: dict, *, data: Path, output: Path, device: str = "auto", minutes: float | None = None) -> None:
    """Train the whole stage, phase by phase; a phase whose result is in `output` is not repeated, a cut one goes on.

    Args:
        config: The keys of `MultiviewConfig`, and settings of `MultiViewTilePipeline`.
        data: Folder of prepared samples; those that are there when a phase starts are used.
        output: Gets `vae/`, `vision_encoder/` and `pipeline/`, which `MultiViewTilePipeline.from_pretrained` loads.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        minutes: Time for the whole run; the phases' own limits are scaled to it.

    A config with a `base` goes on from another first stage instead, see `finetune`.

    Raises:
        InputError: If the config has unknown keys or lacks some, or phases have no minutes of which `minutes` could be made.
    """
    data, output = Path(data), Path(output)
    if "base" in config:
        return finetune(config, data=data, output=output, device=device, minutes=minutes)
    settings = {key: config.get(key, default) for key, default in pipeline_settings().items()}
    config = read(MultiviewConfig, config, elsewhere=settings)
    components = vars(config.components)
    check_components(components)
    limits = share_minutes(vars(config.phases), minutes)
    rigs, size = settings["rigs"] or [settings["rig"]], settings["view_size"]
    processes = PartialState(cpu=device == "cpu")  # one, unless a launcher has started several
    if not (output / "vae").exists() or not (output / "vision_encoder").exists():
        _train_encoders(config, ImageDataset(data, rigs, size), limits, processes, output=output, device=device)
    parts = build_components(components, size, config.seed)
    parts["vae"] = AutoencoderKL.from_pretrained(output / "vae")
    parts["vision_encoder"] = CLIPVisionModelWithProjection.from_pretrained(output / "vision_encoder")
    start_from(config.initial, "unet", parts["unet"])
    pipeline = MultiViewTilePipeline(**parts, **settings)
    options = {"recolored_copies": config.recolored_copies, "seed": config.seed}
    with processes.main_process_first():
        latents = LatentDataset(data, pipeline, output / "latents", processes.device, **options)
    examples = preview_examples(config.validation or data, rigs, size)
    objective = DenoiserObjective(pipeline, latents.empty, examples, config.condition_dropout, config.min_snr_gamma)
    train(objective, latents, config.phases.unet, output, device=device, minutes=limits["unet"])


def _train_encoders(
    config: MultiviewConfig,
    images: ImageDataset,
    limits: dict[str, float | None],
    processes: PartialState,
    *,
    output: Path,
    device: str,
) -> None:
    """The first two phases, which have all pictures in memory; they make `vae/` and `vision_encoder/` where these are missing."""
    phases, components = config.phases, config.components
    if not (output / "vae").exists():
        vae = seeded(build_vae, components.vae, config.seed)
        if config.color_init:
            initialize_with_colors(vae)
        start_from(config.initial, "vae", vae)
        objective = AutoencoderObjective(vae, images.frames.views, config.kl_weight, config.edge_weight)
        train(objective, images, phases.vae, output / "vae-training", device=device, minutes=limits["vae"])
        vae = AutoencoderKL.from_pretrained(output / "vae-training" / "vae")  # the averaged weights
        standardize_latents(vae, images)
        _save_whole(vae, output / "vae", processes)
    if not (output / "vision_encoder").exists():
        vision = seeded(build_vision_encoder, components.vision_encoder, config.seed)
        start_from(config.initial, "vision_encoder", vision)
        objective = VisionObjective(vision, config.temperature)
        train(objective, images, phases.vision, output / "vision-training", device=device, minutes=limits["vision"])
        vision = CLIPVisionModelWithProjection.from_pretrained(output / "vision-training" / "vision_encoder")
        standardize_embeds(vision, images)
        _save_whole(vision, output / "vision_encoder", processes)


def _save_whole(model, folder: Path, processes: PartialState) -> None:
    """Write a component, one process for all, so that its folder exists only when it is whole."""
    if processes.is_main_process:
        partial = folder.with_name(folder.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        partial.rename(folder)
    processes.wait_for_everyone()
