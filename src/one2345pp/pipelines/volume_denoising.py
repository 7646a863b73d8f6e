"""The two diffusions of stage 2 on conditions that are ready: dense occupancy, and distance and colour on sparse voxels.

Axes: B samples, N active voxels, X Y Z grid.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import InputError
from ..models.condition_encoder import ViewBatch, project_pixels
from ..models.sparse import SparseGrid


class VolumeDenoisingMixin:
    """Steps of [`SparseVolumeDiffusionPipeline`]; it has the networks, schedulers, guidance scale and progress bar."""

    def denoise_occupancy(
        self, views: ViewBatch, vector: Tensor | None, num_steps: int, generator, on_step: Callable | None = None
    ) -> Tensor:
        """Draw the shell occupancy, `[B, 1, X, Y, Z]`, about -1 (empty) to 1 (shell)."""
        unet, scheduler = self.occupancy_unet, self.occupancy_scheduler
        side = unet.config.sample_size
        condition = self.occupancy_condition(views)
        previous = None

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            nonlocal previous
            feedback = previous if unet.config.self_conditioning else None
            previous = self._guided(
                lambda levels, vector, _: unet(sample, timestep, levels, vector, feedback).sample, condition, vector
            )
            return previous

        shape = (len(views), unet.config.in_channels, side, side, side)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=unet.dtype)
        return self._denoise(scheduler, noise, [1] * len(views), predict, num_steps, generator, on_step)

    def denoise_sparse(
        self,
        grid: SparseGrid,
        views: ViewBatch,
        vector: Tensor | None,
        num_steps: int,
        generator,
        on_step: Callable | None = None,
        fine: bool = False,
    ) -> Tensor:
        """Draw signed distance (in truncation distances) and colour (in [-1, 1]) on the voxels, `[N, 4]`."""
        unet = self.fine_unet if fine else self.sparse_unet
        condition = (self.fine_condition if fine else self.sparse_condition)(views, grid)
        pixels = project_pixels(views, grid) if unet.config.pixel_channels else None

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            x0 = self._guided(
                lambda levels, vector, pixels: unet(sample, timestep, grid, levels, vector, pixels).sample,
                condition,
                vector,
                pixels,
            )
            return x0.clamp(-1, 1)

        counts = grid.counts.tolist()
        generators = generator if isinstance(generator, list) else [generator] * len(counts)
        noise = [
            randn_tensor((count, unet.config.in_channels), generator=one, device=grid.device, dtype=unet.dtype)
            for count, one in zip(counts, generators, strict=True)
        ]
        return self._denoise(self.sparse_scheduler, torch.cat(noise), counts, predict, num_steps, generator, on_step)

    def _guided(self, predict: Callable, condition: list[Tensor], vector: Tensor | None, pixels=None) -> Tensor:
        """Classifier-free guidance: `x0(null) + s (x0(condition) - x0(null))`; `s` of 1 or less is the condition alone."""
        x0 = predict(condition, vector, pixels)
        if not self.do_classifier_free_guidance:
            return x0
        null = [torch.zeros_like(level) for level in condition]
        no_vector = None if vector is None else torch.zeros_like(vector)
        no_pixels = None if pixels is None else pixels._replace(valid=torch.zeros_like(pixels.valid))
        base = predict(null, no_vector, no_pixels)
        return base + self.guidance_scale * (x0 - base)

    def _denoise(
        self, scheduler, noise: Tensor, counts: list[int], predict: Callable, num_steps: int, generator, on_step
    ) -> Tensor:
        """The loop of both diffusions: any scheduler whose model predicts the clean sample.

        A list of `generator`s has one a sample, `counts` rows of `noise` each, and a sample then takes its steps alone, with what it
        would draw without the others. Interrupted, the loop ends with its last prediction, so there is at least one.
        """
        if scheduler.config.prediction_type != "sample":
            raise InputError(
                f"{type(scheduler).__name__}: prediction_type is {scheduler.config.prediction_type!r}, expected 'sample'. "
                "Build it with from_config(..., prediction_type='sample')."
            )
        scheduler.set_timesteps(num_steps, device=noise.device)
        timesteps, takes_generator = scheduler.timesteps, "generator" in inspect.signature(scheduler.step).parameters
        rows, generators = (counts, generator) if isinstance(generator, list) else ([len(noise)], [generator])
        extras = [{"generator": one} if takes_generator else {} for one in generators]
        # schedulers count their steps, and some remember them, so each sample has its own
        schedulers = [scheduler] if len(rows) == 1 else [copy.deepcopy(scheduler) for _ in rows]
        sample, x0 = noise * scheduler.init_noise_sigma, None
        with self.progress_bar(total=len(timesteps)) as bar:
            for timestep in timesteps:
                if self.interrupt and x0 is not None:
                    return x0
                scaled = [
                    s.scale_model_input(one, timestep) for s, one in zip(schedulers, sample.split(rows), strict=True)
                ]
                x0 = predict(torch.cat(scaled), timestep)
                parts = zip(schedulers, x0.split(rows), sample.split(rows), extras, strict=True)
                sample = torch.cat(
                    [s.step(clean, timestep, one, **extra).prev_sample for s, clean, one, extra in parts]
                )
                if on_step is not None:
                    sample = on_step(timestep, sample)
                bar.update()
        return sample
