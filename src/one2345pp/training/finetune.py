"""Stage 1 from a base model, such as Stable Diffusion 2 as `one2345pp convert stable-diffusion` leaves it: attention first, then all.

Source: Zero123++ (arXiv 2310.15110) section 2.3 and its authors' answers: phase 1 trains self-attention and the keys and values of
cross-attention, as LoRA or the matrices themselves; phase 2 the whole UNet at a small rate.
"""

# B samples, I input pictures a sample, S side of a picture

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn

from ..data.dataset import PreparedDataset
from ..errors import InputError
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline
from .config import read
from .denoiser import DenoiserObjective, pipeline_settings
from .loop import LoopSettings, share_minutes, train
from .multiview_data import Frames, LatentDataset, preview_examples, to_pixels


ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")


@dataclass(frozen=True)
class PhaseSettings(LoopSettings):
    """How one phase is trained, and what of the UNet."""

    trainable: Literal["all", "attention"] = "all"  # attention: self-attention, and keys and values of cross-attention
    lora_rank: int | None = None  # train low-rank additions to these matrices instead of them


@dataclass(frozen=True)
class FinetuneConfig:
    """A config of stage 1 from a base model, beside settings of its pipeline that are to change."""

    base: str  # folder or Hub id of a first stage
    phases: dict[str, PhaseSettings]
    reference_sizes: tuple[int, int] | None = None  # least and most side of the input picture; the view's otherwise
    condition_dropout: float = 0.1
    min_snr_gamma: float | None = 5.0
    validation: str | None = None  # folder of prepared samples to preview, those of training otherwise
    seed: int = 0


def finetune(config: dict, *, data: Path, output: Path, device: str = "auto", minutes: float | None = None) -> None:
    """Train the UNet of a base model, phase by phase; a phase that is done is not repeated, a cut one goes on.

    Args:
        config: The keys of `FinetuneConfig`, and settings of `MultiViewTilePipeline` that are to change, such as `rig`.
        data: Folder of prepared samples.
        output: Gets a folder a phase, and `pipeline/`, the result of the last. A LoRA phase also has `lora/`, for `load_lora_weights`;
            its `pipeline/` has the LoRA fused in.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        minutes: Time for the whole run; the phases' own limits are scaled to it.

    Raises:
        InputError: If the config has unknown keys, a phase trains nothing that can be trained, or phases have no minutes of which
            `minutes` could be made.
    """
    changes = {key: config[key] for key in pipeline_settings() if key in config}
    config = read(FinetuneConfig, config, elsewhere=pipeline_settings())
    if not config.phases:
        raise InputError("config.phases: is empty, expected at least one. Start from configs/multiview-finetune.json.")
    folder, limits = config.base, share_minutes(config.phases, minutes)
    for name, phase in config.phases.items():
        if not (output / name / "done").exists():
            load, place = partial(MultiViewTilePipeline.from_pretrained, folder, **changes), output / name
            _run_phase(config, phase, load, data=data, output=place, device=device, minutes=limits[name])
        folder = output / name / "pipeline"
    processes = PartialState(cpu=device == "cpu")
    if processes.is_main_process:
        MultiViewTilePipeline.from_pretrained(folder).save_pretrained(output / "pipeline")
    processes.wait_for_everyone()


def _run_phase(
    config: FinetuneConfig,
    phase: PhaseSettings,
    load: Callable[[], MultiViewTilePipeline],
    *,
    data: Path,
    output: Path,
    device: str,
    minutes: float | None,
) -> None:
    """One phase from what `load` gives, into a folder of its own."""
    processes = PartialState(cpu=device == "cpu")  # one, unless a launcher has started several
    pipeline = load()
    select_trainable(pipeline.unet, phase.trainable, phase.lora_rank, config.seed)
    sizes, latents = config.reference_sizes, output.parent / "latents"
    with processes.main_process_first():
        dataset = FinetuneDataset(data, pipeline, latents, processes.device, config.seed, has_inputs=sizes is not None)
    examples = preview_examples(config.validation or data, pipeline.rigs, pipeline.config.view_size)
    options = (config.condition_dropout, config.min_snr_gamma)
    objective = FinetuneObjective(pipeline, dataset.empty, examples, *options, reference_sizes=sizes)
    train(objective, dataset, phase, output, device=device, minutes=minutes)
    if not processes.is_main_process:
        return processes.wait_for_everyone()
    if phase.lora_rank is not None:
        fused = load()
        fused.load_lora_weights(output / "lora")
        fused.fuse_lora()
        fused.unload_lora_weights()
        fused.save_pretrained(output / "pipeline")
    (output / "done").touch()
    processes.wait_for_everyone()


def select_trainable(unet: nn.Module, trainable: str, lora_rank: int | None, seed: int = 0) -> None:
    """Let gradients reach what a phase trains, and nothing else.

    Args:
        trainable: `"all"`, or `"attention"`: projections of self-attention (`attn1`), keys and values of cross-attention (`attn2`).
        lora_rank: Rank of low-rank additions to the matrices of `"attention"`; then only those are trained.
    """
    if lora_rank is not None:
        if trainable != "attention":
            raise InputError("lora_rank: is for trainable 'attention'. Leave it out to train everything.")
        try:
            from peft import LoraConfig
        except ImportError:
            raise InputError("lora_rank: needs peft. Run pip install 'one2345pp[lora]'.") from None
        unet.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(ATTENTION)))
        return
    unet.requires_grad_(trainable == "all")
    if trainable == "attention":
        for name, module in unet.named_modules():
            if name.endswith(ATTENTION):
                module.requires_grad_(True)


class FinetuneDataset(LatentDataset):
    """Latents as in `LatentDataset`; with `has_inputs` an item also has its input pictures, `inputs [I, 4, S, S]`."""

    def __init__(
        self,
        data: Path,
        pipeline: MultiViewTilePipeline,
        folder: Path,
        device: str | torch.device = "cpu",
        seed: int = 0,
        has_inputs: bool = False,
    ):
        super().__init__(data, pipeline, folder, device, seed=seed)
        self.prepared = self.frames = None
        if has_inputs:
            self.prepared = PreparedDataset(data)
            self.frames = Frames(self.prepared, pipeline.rigs, pipeline.config.view_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        if self.prepared is not None:
            sample, frame = divmod(index, len(self.frames.views))
            item["inputs"] = self.frames.input_pictures(self.prepared[sample], frame)
        return item


class FinetuneObjective(DenoiserObjective):
    """`DenoiserObjective` on a UNet of which a part is trained, and input pictures of random size, encoded as they are drawn.

    Args:
        reference_sizes: Least and most side of these; without, they are latents of the view's size.
        others: Those of `DenoiserObjective`.
    """

    def __init__(self, pipeline: MultiViewTilePipeline, *others, reference_sizes: tuple[int, int] | None = None):
        super().__init__(pipeline, *others)
        self.reference_sizes = reference_sizes
        self.has_lora = getattr(pipeline.unet, "peft_config", None) is not None
        with torch.no_grad():
            blank = Image.new("RGBA", [pipeline.config.view_size] * 2)
            self.blank = pipeline.prepare_pixels([blank])[0][0, :, :1, :1]

    def collate_references(self, items: list[dict], pick: Tensor, dropped: Tensor, generator) -> Tensor:
        """Pixels `[B, 3 or 4, S, S]` of one size, drawn evenly from `reference_sizes`, else latents."""
        if self.reference_sizes is None:
            return super().collate_references(items, pick, dropped, generator)
        least, most = (math.ceil(side / self.step) for side in self.reference_sizes)
        side = self.step * int(torch.randint(least, most + 1, (), generator=generator))
        pictures = torch.stack([item["inputs"][i] for item, i in zip(items, pick, strict=True)])
        pixels = to_pixels(pictures[:, : len(self.blank)])
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        pixels[dropped] = self.blank
        return pixels

    @property
    def step(self) -> int:
        """Pixels to which the side of a reference is rounded: such that its latents can be halved as often as the UNet does."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_references(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        if self.reference_sizes is None:
            return reference
        vae = self.pipeline.vae.to(reference.device)
        return vae.encode(reference.to(vae.dtype)).latent_dist.sample(generator).float()

    def save(self, modules: nn.ModuleDict, output: Path) -> None:
        """The whole pipeline, or of a LoRA its weights in `output/lora`."""
        if not self.has_lora:
            return super().save(modules, output)
        from peft import get_peft_model_state_dict

        layers = {name: weight.clone() for name, weight in get_peft_model_state_dict(modules["unet"]).items()}
        MultiViewTilePipeline.save_lora_weights(output / "lora", unet_lora_layers=layers)
