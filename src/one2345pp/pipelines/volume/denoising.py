"""The loop of both volume diffusions, and their guidance, on conditions that are ready. The networks are in the pipeline.

Axes: B samples, N rows of all samples: active voxels, or whole grids.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ...errors import InputError
from ...models.unet_sparse import ProjectedPixels


def guided(
    predict: Callable[[list[Tensor], Tensor | None, ProjectedPixels | None], Tensor],
    scale: float,
    condition: list[Tensor],
    vector: Tensor | None,
    pixels: ProjectedPixels | None = None,
) -> Tensor:
    """Classifier-free guidance: `x0(null) + s (x0(condition) - x0(null))`; `s` of 1 or less is the condition alone."""
    x0 = predict(condition, vector, pixels)
    if scale <= 1:
        return x0
    null = [torch.zeros_like(level) for level in condition]
    no_vector = None if vector is None else torch.zeros_like(vector)
    no_pixels = None if pixels is None else pixels._replace(valid=torch.zeros_like(pixels.valid))
    base = predict(null, no_vector, no_pixels)
    return base + scale * (x0 - base)


def check_prediction_type(*schedulers: SchedulerMixin) -> None:
    """Refuse schedulers of models that predict something else than the clean sample."""
    for scheduler in schedulers:
        if scheduler.config.prediction_type != "sample":
            raise InputError(
                f"{type(scheduler).__name__}: prediction_type is {scheduler.config.prediction_type!r}, expected 'sample'. "
                "Build it with from_config(..., prediction_type='sample')."
            )


def denoise(
    scheduler: SchedulerMixin,
    noise: Tensor,  # [N, ...]
    counts: list[int],  # rows of each sample
    predict: Callable[[Tensor, Tensor], Tensor],
    num_steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
    on_step: Callable[[Tensor, Tensor], Tensor] | None = None,
    is_interrupted: Callable[[], bool] = lambda: False,
    progress_bar: Callable | None = None,
) -> Tensor:
    """From noise to a sample, with any scheduler whose model predicts the clean sample.

    Args:
        predict: The clean sample of a noisy one at a timestep.
        generator: A list has one a sample, which then takes its steps alone, with what it would draw without the others.
        on_step: Sees timestep and sample after each step, and returns the sample to go on with.
        is_interrupted: Asked before each step but the first; then the loop ends with its last prediction.
        progress_bar: Of the pipeline.
    """
    check_prediction_type(scheduler)
    scheduler.set_timesteps(num_steps, device=noise.device)
    timesteps, takes_generator = scheduler.timesteps, "generator" in inspect.signature(scheduler.step).parameters
    rows, generators = (counts, generator) if isinstance(generator, list) else ([len(noise)], [generator])
    extras = [{"generator": one} if takes_generator else {} for one in generators]
    # schedulers count their steps, and some remember them, so each sample has its own
    schedulers = [scheduler] if len(rows) == 1 else [copy.deepcopy(scheduler) for _ in rows]
    sample, x0 = noise * scheduler.init_noise_sigma, None
    for timestep in timesteps if progress_bar is None else progress_bar(timesteps):
        if x0 is not None and is_interrupted():
            return x0
        scaled = [s.scale_model_input(one, timestep) for s, one in zip(schedulers, sample.split(rows), strict=True)]
        x0 = predict(torch.cat(scaled), timestep)
        parts = zip(schedulers, x0.split(rows), sample.split(rows), extras, strict=True)
        sample = torch.cat([s.step(clean, timestep, one, **extra).prev_sample for s, clean, one, extra in parts])
        if on_step is not None:
            sample = on_step(timestep, sample)
    return sample
