"""LogSNRScheduler: the checks that diffusers makes of its schedulers, and the statistics that make it a diffusion sampler."""

from __future__ import annotations

import inspect
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from one2345pp.errors import InputError
from one2345pp.schedulers.scheduling_log_snr import LogSNRScheduler


PREDICTIONS = ("sample", "epsilon", "v_prediction")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def alpha_sigma(scheduler, timestep):
    """Read the levels off `add_noise` itself: noise-free and signal-free inputs."""
    one, zero, t = torch.ones(1), torch.zeros(1), torch.tensor([float(timestep)])
    return scheduler.add_noise(one, zero, t).item(), scheduler.add_noise(zero, one, t).item()


def model_output(kind, x0, noise, scheduler, timesteps):
    """What a perfect network of each kind returns."""
    return {"sample": x0, "epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, timesteps)}[kind]


# --- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("u", "expected"), [(0, 9.21), (0.25, 0.14), (0.5, -2.41), (0.7, -4.89), (1, -10.0)])
def test_linear_schedule_has_the_published_values(u, expected):
    """Oracle: values of the method's reference implementation."""
    assert LogSNRScheduler().log_snr(torch.tensor(1000.0 * u)).item() == pytest.approx(expected, abs=0.01)


def test_cosine_schedule_is_the_squared_cosine():
    """Oracle: alpha^2 is the squared cosine of improved DDPM."""
    scheduler = LogSNRScheduler(log_snr_schedule="cosine")
    for u in (0.1, 0.5, 0.9):
        alpha, sigma = alpha_sigma(scheduler, 1000 * u)
        assert alpha == pytest.approx(math.cos((u + 0.008) / 1.008 * math.pi / 2), abs=1e-5)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-6)
    assert torch.isfinite(scheduler.log_snr(torch.tensor([0.0, 1000.0]))).all()


def test_linear_schedule_is_the_limit_of_ddpm_with_linear_betas():
    """Oracle: DDPM's cumulated alphas with betas 1e-4..0.02, so stock schedulers serve a network trained with either."""
    ours = LogSNRScheduler().log_snr(torch.arange(1000)).sigmoid().sqrt()
    assert (ours - DDPMScheduler(beta_start=1e-4, beta_end=0.02).alphas_cumprod.sqrt()).abs().max() < 0.01


@pytest.mark.parametrize("name", LogSNRScheduler._compatibles)
def test_compatibles(name):
    """Proves that a stock scheduler made from our configuration predicts x0, clips alike and has the same noise levels."""
    ours = LogSNRScheduler()
    stock = getattr(diffusers, name).from_config(ours.config)
    assert stock.config.prediction_type == "sample"
    assert stock.config.num_train_timesteps == 1000
    difference = stock.alphas_cumprod.sqrt() - ours.log_snr(torch.arange(1000)).sigmoid().sqrt()
    assert difference.abs().max() < 0.01


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", LogSNRScheduler._compatibles)
def test_compatibles_begin_at_pure_noise(name, steps, tmp_path):
    """What is denoised is pure noise, so the first timestep is the noisiest, also after saving, and in few steps."""
    LogSNRScheduler().save_pretrained(tmp_path)
    stock = getattr(diffusers, name).from_config(LogSNRScheduler.from_pretrained(tmp_path).config)
    stock.set_timesteps(steps)
    assert stock.timesteps[0] == 999 and len(stock.timesteps) == steps


# --- the checks of diffusers' SchedulerCommonTest that apply ---------------------------------------------------------


def test_from_save_pretrained(tmp_path):
    scheduler = LogSNRScheduler(sign_step_threshold=0.7, log_snr_schedule="cosine", stochastic=False)
    scheduler.save_pretrained(tmp_path)
    loaded = LogSNRScheduler.from_pretrained(tmp_path)
    assert loaded.config == scheduler.config
    assert loaded.config.sign_step_threshold == 0.7 and not loaded.config.stochastic


def test_step_shape(rng):
    """Any shape: dense grids and sparse rows alike."""
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(5)
    for shape in ((2, 1, 4, 4, 4), (100, 4), (3,)):
        sample = torch.randn(shape, generator=rng)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(0.1 * sample, timestep, sample, generator=rng).prev_sample
            assert sample.shape == shape and torch.isfinite(sample).all()


def test_scheduler_outputs_equivalence(rng):
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(5)
    sample = torch.randn(4, 4, generator=rng)
    as_dict = scheduler.step(sample, 999, sample, torch.Generator().manual_seed(1))
    as_tuple = scheduler.step(sample, 999, sample, torch.Generator().manual_seed(1), return_dict=False)
    assert torch.equal(as_dict.prev_sample, as_tuple[0]) and torch.equal(as_dict.pred_original_sample, as_tuple[1])


def test_scheduler_public_api():
    scheduler = LogSNRScheduler()
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and len(scheduler) == 1000
    sample = torch.ones(2, 3)
    assert scheduler.scale_model_input(sample, 3) is sample
    assert "generator" in inspect.signature(scheduler.step).parameters
    scheduler.set_timesteps(10, device="cpu")
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 10


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_timesteps_fall_within_the_range_of_training(steps):
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(steps)
    assert (scheduler.timesteps.diff() < 0).all() and scheduler.timesteps.is_floating_point()
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps[-1] >= 0


def test_add_noise_device_and_rows(rng):
    """Proves that each entry of the first axis has its own level, for grids and for sparse rows."""
    scheduler = LogSNRScheduler()
    timesteps = torch.tensor([10.0, 900.0])
    clean, noise = torch.randn(2, 1, 3, 3, 3, generator=rng), torch.randn(2, 1, 3, 3, 3, generator=rng)
    together = scheduler.add_noise(clean, noise, timesteps)
    for index in range(2):
        alpha, sigma = alpha_sigma(scheduler, timesteps[index])
        torch.testing.assert_close(together[index], alpha * clean[index] + sigma * noise[index])
    rows = scheduler.add_noise(clean.view(54, 1), noise.view(54, 1), timesteps.repeat_interleave(27))
    assert torch.equal(rows.view_as(together), together)


def test_dtype_is_kept(rng):
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(3)
    sample = torch.randn(4, 4, generator=rng).bfloat16()
    out = scheduler.step(sample, scheduler.timesteps[0], sample, generator=rng)
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == torch.bfloat16
    assert scheduler.add_noise(sample, sample, torch.tensor(5)).dtype == torch.bfloat16


@pytest.mark.parametrize("kwargs", [{"log_snr_schedule": "square"}, {"prediction_type": "score"}])
def test_unknown_choices_are_named(kwargs):
    with pytest.raises(InputError, match="expected one of"):
        LogSNRScheduler(**kwargs)


@pytest.mark.parametrize("steps", [0, 1001])
def test_unusable_number_of_steps_is_named(steps):
    with pytest.raises(InputError, match="from 1 to 1000"):
        LogSNRScheduler().set_timesteps(steps)


# --- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [True, False], ids=["ancestral", "ddim"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_full_loop_with_a_perfect_model_returns_the_sample(prediction_type, stochastic, rng):
    """Proves the loop: a network that knows x0 leads to x0, exactly when it predicts it."""
    scheduler = LogSNRScheduler(prediction_type=prediction_type, stochastic=stochastic)
    scheduler.set_timesteps(20)
    x0 = torch.rand(64, 4, generator=rng) * 2 - 1
    sample = torch.randn(64, 4, generator=rng)
    for timestep in scheduler.timesteps:
        alpha, sigma = alpha_sigma(scheduler, timestep)
        noise = (sample - alpha * x0) / sigma
        output = model_output(prediction_type, x0, noise, scheduler, timestep)
        sample = scheduler.step(output, timestep, sample, generator=rng).prev_sample
    if prediction_type == "sample":
        assert torch.equal(sample, x0)
    torch.testing.assert_close(sample, x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stochastic", [True, False], ids=["ancestral", "ddim"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_step_has_the_marginals_of_the_forward_process(schedule, stochastic, rng):
    """Oracle: x_t ~ q(x_t | x0), moved by a step with the true x0, follows q(x_s | x0): mean alpha_s x0, deviation sigma_s."""
    scheduler = LogSNRScheduler(log_snr_schedule=schedule, stochastic=stochastic, clip_sample=False)
    scheduler.set_timesteps(4)
    count, x0 = 400_000, torch.tensor(0.6)
    for index in range(3):
        timestep, following = scheduler.timesteps[index : index + 2]
        noisy = scheduler.add_noise(x0.expand(count), torch.randn(count, generator=rng), timestep)
        moved = scheduler.step(x0.expand(count), timestep, noisy, generator=rng).prev_sample
        alpha, sigma = alpha_sigma(scheduler, following)
        assert moved.mean().item() == pytest.approx(alpha * 0.6, abs=5 / math.sqrt(count))
        assert moved.std().item() == pytest.approx(sigma, abs=5 / math.sqrt(count))


def test_ancestral_step_correlates_with_the_current_sample_as_the_forward_process(rng):
    """Oracle: the joint law. Cov(x_t, x_s | x0) of the forward chain is (alpha_t / alpha_s) sigma_s^2; a sampler that ignored x_t
    would still pass the marginals."""
    scheduler = LogSNRScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    count = 400_000
    timestep, following = scheduler.timesteps[1:3]
    noisy = scheduler.add_noise(torch.zeros(count), torch.randn(count, generator=rng), timestep)
    moved = scheduler.step(torch.zeros(count), timestep, noisy, generator=rng).prev_sample
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(scheduler, timestep), alpha_sigma(scheduler, following)
    assert (noisy * moved).mean().item() == pytest.approx(alpha_t / alpha_s * sigma_s**2, abs=0.01)


def test_the_best_estimator_samples_the_data(rng):
    """Oracle: for Gaussian data the posterior mean is known; sampling with it must return the data's mean and spread
    (up to the spread that a finite number of steps loses)."""
    mean, spread = 0.3, 0.2
    for stochastic in (True, False):
        scheduler = LogSNRScheduler(stochastic=stochastic, clip_sample=False)
        scheduler.set_timesteps(250)
        sample = torch.randn(10_000, generator=rng)
        for timestep in scheduler.timesteps:
            alpha, sigma = alpha_sigma(scheduler, timestep)
            gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
            sample = scheduler.step(mean + gain * (sample - alpha * mean), timestep, sample, generator=rng).prev_sample
        assert sample.mean().item() == pytest.approx(mean, abs=0.01)
        assert sample.std().item() == pytest.approx(spread, abs=0.02)


def test_deterministic_step_agrees_with_ddim(rng):
    """Oracle: diffusers' DDIM made from our configuration, over the same timesteps; the schedules' small difference is left."""
    ours = LogSNRScheduler(stochastic=False)
    stock = DDIMScheduler.from_config(ours.config)
    stock.set_timesteps(10)
    ours.timesteps = stock.timesteps.float()
    sample, output = torch.randn(1000, generator=rng), torch.rand(1000, generator=rng) * 2 - 1
    for timestep in stock.timesteps[:9]:
        expected = stock.step(output, timestep, sample).prev_sample
        torch.testing.assert_close(ours.step(output, timestep, sample).prev_sample, expected, atol=0.05, rtol=0.05)


def test_sign_step_below_the_threshold_only(rng):
    """Proves the occupancy rule: sign below u = 0.7, clamp above."""
    scheduler = LogSNRScheduler(sign_step_threshold=0.7)
    output, sample = torch.tensor([0.2, -0.3, 1.7]), torch.randn(3, generator=rng)
    above = scheduler.step(output, 701, sample, generator=rng).pred_original_sample
    below = scheduler.step(output, 699, sample, generator=rng).pred_original_sample
    torch.testing.assert_close(above, torch.tensor([0.2, -0.3, 1.0]))
    assert below.tolist() == [1, -1, 1]


def test_clip_sample(rng):
    output = torch.tensor([3.0, -3.0])
    for clip, bound in ((True, 1.0), (False, 3.0)):
        out = LogSNRScheduler(clip_sample=clip).step(output, 500, torch.zeros(2), generator=rng)
        assert out.pred_original_sample.abs().max() == bound


def test_noise_comes_from_the_generator_and_never_in_the_last_step():
    """Proves that equal seeds repeat bit for bit, that the global state is untouched, and that the last step draws nothing."""
    scheduler = LogSNRScheduler()
    scheduler.set_timesteps(4)
    sample = torch.linspace(-1, 1, 12).view(3, 4)
    state = torch.get_rng_state()
    first, second = (
        scheduler.step(sample, 999, sample, generator=torch.Generator().manual_seed(3)).prev_sample for _ in range(2)
    )
    other = scheduler.step(sample, 999, sample, generator=torch.Generator().manual_seed(4)).prev_sample
    assert torch.equal(first, second) and not torch.equal(first, other)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    scheduler.step(sample, scheduler.timesteps[-1], sample, generator=generator)
    assert torch.equal(before, generator.get_state())
    assert torch.equal(state, torch.get_rng_state())
