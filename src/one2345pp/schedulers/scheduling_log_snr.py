"""The continuous log-SNR noise schedule of the volume diffusions and its sampler. Networks and training losses live elsewhere.

Notation: time u in [0, 1] is `timestep / num_train_timesteps`; VP noise, `x_t = alpha x_0 + sigma eps` with `alpha^2 + sigma^2 = 1`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import InputError


PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")


def linear_log_snr(time: Tensor, floor: float = 1e-4, slope: float = 10.0) -> Tensor:
    """`-log(expm1(1e-4 + 10 u^2))`: the continuous limit of DDPM's linear betas from 1e-4 to 0.02."""
    return -torch.log(torch.expm1(floor + slope * time**2))


def cosine_log_snr(time: Tensor, offset: float = 0.008) -> Tensor:
    """`-log(cos((u + s) / (1 + s) pi / 2)^-2 - 1)`, kept finite at `u = 1`."""
    angle = (time + offset) / (1 + offset) * math.pi / 2
    return -torch.log((torch.cos(angle) ** -2 - 1).clamp(min=1e-5, max=1e9))


LOG_SNR_SCHEDULES = {"linear": linear_log_snr, "cosine": cosine_log_snr}


@dataclass
class LogSNRSchedulerOutput(BaseOutput):
    """One step of `LogSNRScheduler`.

    Args:
        prev_sample: The sample at the next, less noisy time.
        pred_original_sample: The estimate of the clean sample, after its clamp or sign.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class LogSNRScheduler(SchedulerMixin, ConfigMixin):
    """Sampler over a continuous log-SNR schedule, for a sample of any shape: dense grids or the rows of sparse voxels.

    Stock diffusers schedulers with `prediction_type="sample"` and linear betas from 1e-4 to 0.02 serve the same networks;
    `DDIMScheduler.from_config(scheduler.config)` is such a scheduler.

    Args:
        num_train_timesteps: Timesteps run over [0, `num_train_timesteps`); they need not be integers.
        log_snr_schedule: `"linear"` or `"cosine"`.
        prediction_type: What the network predicts: `"sample"`, `"epsilon"` or `"v_prediction"`.
        clip_sample: Clamp the estimate of the clean sample to [-1, 1] in every step.
        sign_step_threshold: Replace the estimate by its sign while `u` is below this, for occupancy in {-1, 1} (the source uses
            0.7); `None` for never.
        stochastic: Draw from the posterior (ancestral) in each step but the last; if false, follow DDIM's deterministic path.
        timestep_spacing: `"trailing"`, from pure noise on, and no other. It is here for stock schedulers, which take it over by
            `from_config`: by their own default some begin at less noisy timesteps, with one step at the clean sample's.

    Source: LAS-Diffusion, after Kingma et al., "Variational Diffusion Models"; unlike there, the last step returns the estimate.
    """

    _compatibles = [
        "DDPMScheduler",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        log_snr_schedule: str = "linear",
        prediction_type: str = "sample",
        clip_sample: bool = True,
        sign_step_threshold: float | None = None,
        stochastic: bool = True,
        timestep_spacing: str = "trailing",
    ):
        if timestep_spacing != "trailing":
            raise InputError(f"timestep_spacing: got {timestep_spacing!r}, expected 'trailing'.")
        if log_snr_schedule not in LOG_SNR_SCHEDULES:
            raise InputError(
                f"log_snr_schedule: got {log_snr_schedule!r}, expected one of {', '.join(LOG_SNR_SCHEDULES)}."
            )
        if prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"prediction_type: got {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}."
            )
        # from_config of another class drops values that were left at our defaults, which are not its own ("sample" above all)
        self.register_to_config(_use_default_values=[])
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose evenly spaced, falling timesteps from the noisiest one; the last step ends at the clean sample."""
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise InputError(
                f"num_inference_steps: got {num_inference_steps}, expected from 1 to {self.config.num_train_timesteps}, "
                "the num_train_timesteps of the scheduler."
            )
        self.num_inference_steps = num_inference_steps
        start = self.config.num_train_timesteps - 1
        self.timesteps = torch.linspace(start, 0, num_inference_steps + 1, dtype=torch.float32)[:-1].to(device)

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """Log signal-to-noise ratio `log(alpha^2 / sigma^2)` at `timesteps`, float32, same shape."""
        return LOG_SNR_SCHEDULES[self.config.log_snr_schedule](timesteps.float() / self.config.num_train_timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample as it is: VP noise needs no scaling."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x_0 + sigma eps`.

        Args:
            original_samples: Clean samples, `[B, ...]`, or sparse rows `[N, C]`.
            noise: Like `original_samples`.
            timesteps: One for all, or one for each entry of the first axis: for sparse rows `timesteps[grid.sample_index]`.
        """
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha eps - sigma x_0`, the target of `prediction_type="v_prediction"`; arguments as in `add_noise`."""
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        return alpha * noise - sigma * sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LogSNRSchedulerOutput | tuple[Tensor, Tensor]:
        """Move `sample` from `timestep` to the next, less noisy one.

        Args:
            model_output: What the network predicted, like `sample`.
            timestep: The current one of `timesteps`.
            sample: The current noisy sample, any shape.
            generator: Source of the noise; unused when not `stochastic` and in the last step.
            return_dict: Return a `LogSNRSchedulerOutput` instead of a tuple.

        Returns:
            `LogSNRSchedulerOutput`, or the tuple of its fields; like `sample`.
        """
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        timesteps = self.timesteps.to(sample.device)
        index = int((timesteps - timestep).abs().argmin())
        x0 = self._predict_x0(model_output.float(), sample.float(), timestep)
        if index + 1 == len(timesteps):
            previous = x0
        else:
            previous = self._move(x0, sample.float(), timestep, timesteps[index + 1], generator)
        x0, previous = x0.to(sample.dtype), previous.to(sample.dtype)
        return LogSNRSchedulerOutput(previous, x0) if return_dict else (previous, x0)

    def _predict_x0(self, model_output: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = self._alpha_sigma(timestep, sample)
        if self.config.prediction_type == "epsilon":
            x0 = (sample - sigma * model_output) / alpha
        elif self.config.prediction_type == "v_prediction":
            x0 = alpha * sample - sigma * model_output
        else:
            x0 = model_output
        threshold = self.config.sign_step_threshold
        if threshold is not None and timestep / self.config.num_train_timesteps < threshold:
            return x0.sign()
        return x0.clamp(-1, 1) if self.config.clip_sample else x0

    def _move(self, x0: Tensor, sample: Tensor, timestep: Tensor, previous_timestep: Tensor, generator) -> Tensor:
        """A draw from `q(x_s | x_t, x_0)`, or the deterministic DDIM step."""
        alpha_t, sigma_t = self._alpha_sigma(timestep, sample)
        alpha_s, sigma_s = self._alpha_sigma(previous_timestep, sample)
        if not self.config.stochastic:
            return alpha_s * x0 + sigma_s * (sample - alpha_t * x0) / sigma_t
        c = -torch.expm1(self.log_snr(timestep) - self.log_snr(previous_timestep))  # 1 - SNR_t / SNR_s
        mean = alpha_s * (sample * (1 - c) / alpha_t + c * x0)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return mean + sigma_s * c.sqrt() * noise

    def _alpha_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise levels, shaped to multiply `like` along its first axis."""
        log_snr = self.log_snr(torch.as_tensor(timesteps, device=like.device))
        log_snr = log_snr.reshape(-1, *[1] * (like.ndim - 1)) if log_snr.ndim else log_snr
        return log_snr.sigmoid().sqrt().to(like.dtype), (-log_snr).sigmoid().sqrt().to(like.dtype)
