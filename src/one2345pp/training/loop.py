"""One accelerate loop for every network: weighted sampling, EMA, exact resume, a time limit. Objectives live beside it."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from ..errors import InputError
from .optimizer import MuonAdamW


logger = logging.getLogger(__name__)

LOG_STEPS = 50  # of which the mean is a row of the log


@dataclass(frozen=True)
class LoopSettings:
    """How a network is trained, whatever it learns."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    batch_size: int = 8
    lr: float = 3e-4
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # to a tenth, over max_steps or minutes, whichever ends first
    warmup_steps: int = 200
    weight_decay: float = 1e-2
    grad_clip: float = 1.0  # most that the norm of the gradient is; 0 for no limit
    max_steps: int = 100_000
    minutes: float | None = None
    ema_decay: float = 0.999
    mixed_precision: str = "auto"  # bf16 on CUDA, no elsewhere; bf16 also serves a CPU that multiplies in it (AMX)
    compile: str | Callable | None = "auto"  # backend of torch.compile: "inductor" on CUDA, none (null) elsewhere
    seed: int = 0
    num_workers: int = 0
    checkpoint_minutes: float = 5.0
    preview_minutes: float = 15.0


class Objective(Protocol):
    """What a network learns.

    `modules` holds what is trained. `collate(items, generator)` makes a batch of dataset items, augmentation included.
    `loss(batch, generator)` returns the scalar to minimise and figures for the log. `preview(modules, path)` draws a PNG,
    `save(modules, folder)` writes the components into an empty folder; both are called with the averaged weights in `modules`. Where
    `same_shapes` is false, as with voxels, whose number changes from step to step, nothing is compiled.
    """

    modules: nn.ModuleDict

    def collate(self, items: list[Any], generator: torch.Generator) -> dict: ...

    def loss(self, batch: dict, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]: ...

    def preview(self, modules: nn.ModuleDict, path: Path) -> None: ...

    def save(self, modules: nn.ModuleDict, output: Path) -> None: ...


class _Loss(nn.Module):
    """The objective as one module, so that accelerate can wrap it for several processes."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.trained = objective.modules
        self.objective = objective

    def forward(self, batch: dict, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return self.objective.loss(batch, generator)


class _StepSampler(Sampler):
    """Indices of step `n` depend on the seed and `n` alone, so a resumed run draws what the whole run would have drawn."""

    def __init__(self, weights: Tensor, batch_size: int, seed: int, first_step: int):
        self.weights, self.batch_size, self.seed, self.first_step = weights, batch_size, seed, first_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            generator = step_generator(self.seed, step, stream=1)
            yield torch.multinomial(self.weights, self.batch_size, replacement=True, generator=generator).tolist()
            step += 1


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator for one step of one stream of draws."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 7 + stream)


def train(
    objective: Objective,
    dataset: Dataset,
    settings: LoopSettings,
    output: Path,
    *,
    device: str = "auto",
    minutes: float | None = None,
) -> None:
    """Train until `max_steps` or `minutes`, resuming from `output/state.pt` when it is there.

    Args:
        objective: What to learn.
        dataset: Items for `objective.collate`; sampled by its `weights` if it has any.
        settings: How.
        output: Folder for `state.pt`, `log.jsonl`, previews and what `objective.save` writes.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        minutes: Overrides the time limit of the settings, which counts over all resumed runs.
    """
    limit = 60 * (minutes if minutes is not None else settings.minutes or math.inf)
    output.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another number format
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=_precision(settings, device))
    model = _Loss(objective).to(accelerator.device)
    _compile(objective, settings, accelerator)
    parameters = [p for p in objective.modules.parameters() if p.requires_grad]
    optimizer = _make_optimizer(settings, parameters, accelerator)
    ema = EMAModel(parameters, decay=settings.ema_decay, use_ema_warmup=True, power=0.75)
    state = _load_state(output, objective, ema, optimizer)
    step, elapsed = state["step"], state["elapsed"]
    model, optimizer = accelerator.prepare(model, optimizer)
    seed = settings.seed + 7919 * accelerator.process_index
    batches = _batches(dataset, settings, seed, step)

    def checkpoint(preview: bool) -> None:
        if accelerator.is_main_process:
            _save_state(output, objective, ema, optimizer, step, elapsed)
            _save_averaged(objective, ema, parameters, output, f"preview-{step:07d}.png" if preview else None)

    objective.modules.train()
    bar = tqdm(total=settings.max_steps, initial=step, disable=not accelerator.is_local_main_process, mininterval=10)
    saved = previewed = elapsed
    figures: list[dict[str, float]] = []
    clock = time.monotonic()
    while step < settings.max_steps and elapsed < limit:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _rate(settings, step, elapsed, limit)
        generator = step_generator(seed, step)
        batch = to_device(objective.collate(next(batches), generator), accelerator.device)
        # Dropout draws from the global generator; seeded, it too depends on the seed and the step alone.
        torch.manual_seed(step_generator(seed, step, stream=2).initial_seed())
        with accelerator.autocast(), _attention_kernel(accelerator):
            loss, logs = model(batch, generator)
        accelerator.backward(loss)
        if settings.grad_clip:
            accelerator.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        step += 1
        now = time.monotonic()
        elapsed, clock = _of_main_process(elapsed + now - clock, accelerator), now
        figures.append({"loss": loss.item(), **logs})
        bar.update()
        if step % LOG_STEPS == 0:
            mean = {k: sum(f[k] for f in figures) / len(figures) for k in figures[0]}
            figures.clear()
            bar.set_postfix(loss=f"{mean['loss']:.4f}")
            if accelerator.is_main_process:
                _append(output / "log.jsonl", {"step": step, "minutes": round(elapsed / 60, 3), **mean})
        if elapsed - saved > 60 * settings.checkpoint_minutes:
            draw = elapsed - previewed > 60 * settings.preview_minutes
            checkpoint(preview=draw)
            saved, previewed = elapsed, elapsed if draw else previewed
    bar.close()
    checkpoint(preview=True)
    accelerator.wait_for_everyone()  # all processes go on with what the main one has written
    logger.info("%s: %d steps, %.1f minutes", output, step, elapsed / 60)


def share_minutes(phases: dict[str, LoopSettings], minutes: float | None) -> dict[str, float | None]:
    """Time limits of a run's phases: their own `minutes`, scaled to add up to `minutes` if that is given.

    Raises:
        InputError: If a phase has no minutes of its own to be scaled.
    """
    limits = {name: phase.minutes for name, phase in phases.items()}
    if minutes is None:
        return limits
    if without := [name for name, limit in limits.items() if not limit]:
        raise InputError(
            f"minutes: {minutes} cannot be shared out, since every phase of the config needs minutes of its own, and "
            f"{', '.join(without)} has none. Set them, or leave --minutes out."
        )
    return {name: minutes * limit / sum(limits.values()) for name, limit in limits.items()}


def log_validation(preview: Path, **figures: float) -> None:
    """Add figures to the `validation.jsonl` beside a preview, at the preview's step."""
    _append(preview.with_name("validation.jsonl"), {"step": int(preview.stem.split("-")[-1]), **figures})


def to_device(batch: Any, device: torch.device) -> Any:
    """What of a batch has a device on this one; the rest, such as pictures, as it is."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch


def _append(file: Path, row: dict) -> None:
    with open(file, "a") as log:
        log.write(json.dumps(row) + "\n")


def _precision(settings: LoopSettings, device: str) -> str:
    """accelerate's name of the number format; bf16 by default where the run will be on CUDA."""
    if settings.mixed_precision != "auto":
        return settings.mixed_precision
    return "bf16" if device in ("auto", "cuda") and torch.cuda.is_available() else "no"


def _compile(objective: Objective, settings: LoopSettings, accelerator: Accelerator) -> None:
    """Compile the networks in place, which keeps the names of their weights, if the config or the device says so."""
    backend = settings.compile
    if backend == "auto":
        backend = "inductor" if accelerator.device.type == "cuda" else None
    if backend is not None and getattr(objective, "same_shapes", True):
        for module in objective.modules.values():
            module.compile(backend=backend, dynamic=False)


def _make_optimizer(
    settings: LoopSettings, parameters: list[nn.Parameter], accelerator: Accelerator
) -> torch.optim.Optimizer:
    kinds = {"adamw": torch.optim.AdamW, "muon": MuonAdamW}
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "betas": (0.9, 0.99)}
    if settings.optimizer == "muon" and accelerator.mixed_precision == "bf16":
        options["dtype"] = torch.bfloat16
    return kinds[settings.optimizer](parameters, **options)


def _batches(dataset: Dataset, settings: LoopSettings, seed: int, first_step: int) -> Iterator[list[Any]]:
    """Lists of items, by the weights of the dataset if it has any, from `first_step` on and without end."""
    weights = getattr(dataset, "weights", torch.ones(len(dataset), dtype=torch.float64))
    sampler = _StepSampler(weights, settings.batch_size, seed, first_step)
    return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=settings.num_workers, collate_fn=list))


def _attention_kernel(accelerator: Accelerator) -> AbstractContextManager:
    """Plain products for attention in bf16 on a CPU, where the fused kernel's backward pass takes five times as long."""
    plain = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def _rate(settings: LoopSettings, step: int, elapsed: float, limit: float) -> float:
    """Learning rate as a share of its peak."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.lr_schedule == "constant":
        return warmup
    progress = min(1.0, max(step / settings.max_steps, elapsed / limit))
    return warmup * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def _of_main_process(seconds: float, accelerator: Accelerator) -> float:
    """The main process's figure in all of them: weights stay equal only where rates do, and all stop after the same step."""
    if accelerator.num_processes == 1:
        return seconds
    return broadcast(torch.tensor(seconds, dtype=torch.float64, device=accelerator.device)).item()


def _load_state(output: Path, objective: Objective, ema: EMAModel, optimizer) -> dict:
    path = output / "state.pt"
    if not path.exists():
        return {"step": 0, "elapsed": 0.0}
    state = torch.load(path, map_location="cpu", weights_only=True)
    objective.modules.load_state_dict(state["modules"])
    ema.load_state_dict(state["ema"])
    ema.to(next(objective.modules.parameters()).device)
    optimizer.load_state_dict(state["optimizer"])
    return {"step": state["step"], "elapsed": state["elapsed"]}


def _save_state(output: Path, objective: Objective, ema: EMAModel, optimizer, step: int, elapsed: float) -> None:
    state = {
        "step": step,
        "elapsed": elapsed,
        "modules": objective.modules.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = output / "state.pt.part"
    torch.save(state, partial)
    partial.replace(output / "state.pt")


@torch.no_grad()
def _save_averaged(objective: Objective, ema: EMAModel, parameters: list, output: Path, preview: str | None) -> None:
    """Write the components with averaged weights, and a preview by them if it has a name; training goes on with its own."""
    ema.store(parameters)
    ema.copy_to(parameters)
    objective.modules.eval()
    _save_components(objective, output)
    if preview is not None:
        objective.preview(objective.modules, output / preview)
    objective.modules.train()
    ema.restore(parameters)


def _save_components(objective: Objective, output: Path) -> None:
    """What `objective.save` writes, beside `output` at first, so that a cut leaves no half a file where a whole one was."""
    partial = output / "components.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    objective.save(objective.modules, partial)
    for file in [path for path in partial.rglob("*") if path.is_file()]:
        target = output / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(partial)
