"""Stage 1 from a base model, such as Stable Diffusion 2 as `one2345pp convert stable-diffusion` leaves it: attention first, then all.

Source: Zero123++ (arXiv 2310.15110) section 2.3 and its authors' answers: phase 1 trains self-attention and the keys and values of
cross-attention, as LoRA or the matrices themselves; phase 2 the whole UNet at a small rate.
"""

# B samples, I input pictures a sample, S side of a picture

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn

from ..data.dataset import PreparedDataset
from ..errors import InputError
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline
from .loop import share_minutes, train
from .multiview import SCALARS, DenoiserObjective
from .tiles import Frames, LatentDataset, preview_examples, to_pixels


DEFAULTS = {
    "base": None,  # folder or Hub id of a first stage
    "reference_sizes": None,  # [least, most] side of the input picture, drawn for each batch; the view's size otherwise
    "condition_dropout": 0.1,
    "min_snr_gamma": 5.0,
    "recolored_copies": 0,
    "validation": None,
    "seed": 0,
}
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")
PHASE = {
    "trainable": "all",  # or "attention": self-attention, and keys and values of cross-attention
    "lora_rank": None,  # train low-rank additions to these matrices instead of them
}


def finetune(config: dict, *, data: Path, output: Path, device: str = "auto", minutes: float | None = None) -> None:
    """Train the UNet of a base model, phase by phase; a phase that is done is not repeated, a cut one goes on.

    Args:
        config: Keys of `DEFAULTS`, `phases` (names to configs of `training.loop` with the keys of `PHASE`), and values of the
            pipeline's config that are to change, such as `rig`.
        data: Folder of prepared samples.
        output: Gets a folder a phase, and `pipeline/`, the result of the last. A LoRA phase also has `lora/`, for `load_lora_weights`;
            its `pipeline/` has the LoRA fused in.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        minutes: Time for the whole run; the phases' own limits are scaled to it.

    Raises:
        InputError: If the config has unknown keys, a phase trains nothing that can be trained, or phases have no minutes of which
            `minutes` could be made.
    """
    unknown = set(config) - set(DEFAULTS) - set(SCALARS) - {"phases"}
    if unknown or not config.get("phases"):
        raise InputError(
            f"config: unknown keys {sorted(unknown)}, needs phases. Start from configs/multiview-finetune.json."
        )
    folder = config["base"]
    limits = share_minutes(config["phases"], minutes)
    for name, phase in config["phases"].items():
        if not (output / name / "done").exists():
            _run_phase(config, phase, folder, data=data, output=output / name, device=device, minutes=limits[name])
        folder = output / name / "pipeline"
    processes = PartialState(cpu=device == "cpu")
    if processes.is_main_process:
        MultiViewTilePipeline.from_pretrained(folder).save_pretrained(output / "pipeline")
    processes.wait_for_everyone()


def _run_phase(config: dict, phase: dict, folder, *, data: Path, output: Path, device: str, minutes) -> None:
    processes = PartialState(cpu=device == "cpu")  # one, unless a launcher has started several
    choice = {key: phase.get(key, default) for key, default in PHASE.items()}
    loop = {key: value for key, value in phase.items() if key not in PHASE}
    pipeline = MultiViewTilePipeline.from_pretrained(folder)
    pipeline.register_to_config(**{key: config[key] for key in SCALARS if key in config})
    config = {**DEFAULTS, **{key: pipeline.config[key] for key in SCALARS}, **config}
    select_trainable(pipeline.unet, **choice, seed=config["seed"])
    with processes.main_process_first():
        dataset = FinetuneDataset(data, config, pipeline, output.parent / "latents", processes.device)
    examples = preview_examples(config["validation"] or data, config)
    objective = FinetuneObjective(config, pipeline, dataset.empty, examples)
    train(objective, dataset, loop, output, device=device, minutes=minutes)
    if not processes.is_main_process:
        return processes.wait_for_everyone()
    if choice["lora_rank"] is not None:
        fused = MultiViewTilePipeline.from_pretrained(folder, **{key: config[key] for key in SCALARS})
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
    if trainable not in ("all", "attention"):
        raise InputError(f"trainable: got {trainable!r}, expected 'all' or 'attention'.")
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
    """Latents as in `LatentDataset`; with `reference_sizes` an item also has its input pictures, `inputs [I, 4, S, S]`."""

    def __init__(
        self,
        data: Path,
        config: dict,
        pipeline: MultiViewTilePipeline,
        folder: Path,
        device: str | torch.device = "cpu",
    ):
        if config["recolored_copies"]:
            raise InputError("recolored_copies: a base model knows its colours. Leave it at 0.")
        super().__init__(data, config, pipeline, folder, device)
        self.prepared = PreparedDataset(data) if config["reference_sizes"] else None
        self.frames = Frames(self.prepared, config) if self.prepared is not None else None

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        if self.prepared is not None:
            sample, frame = divmod(index, len(self.frames.views))
            item["inputs"] = self.frames.input_pictures(self.prepared[sample], frame)
        return item


class FinetuneObjective(DenoiserObjective):
    """`DenoiserObjective` on a UNet of which a part is trained, and input pictures of random size, encoded as they are drawn.

    `config` is that of `finetune` with the pipeline's own scalars.
    """

    def __init__(self, config: dict, pipeline: MultiViewTilePipeline, empty: Tensor, examples: list):
        super().__init__({**config, "initial": None}, pipeline, empty, examples)
        self.has_lora = getattr(pipeline.unet, "peft_config", None) is not None
        with torch.no_grad():
            self.blank = pipeline.prepare_pixels([Image.new("RGBA", [config["view_size"]] * 2)])[0][0, :, :1, :1]

    def collate_references(self, items: list[dict], pick: Tensor, dropped: Tensor, generator) -> Tensor:
        """Pixels `[B, 3 or 4, S, S]` of one size, drawn evenly from `reference_sizes`, else latents."""
        if self.config["reference_sizes"] is None:
            return super().collate_references(items, pick, dropped, generator)
        least, most = (math.ceil(side / self.step) for side in self.config["reference_sizes"])
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
        if self.config["reference_sizes"] is None:
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
