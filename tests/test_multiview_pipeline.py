"""What is this pipeline's own: its schedulers, its two passes, its pictures. What it shares with every diffusers pipeline:
test_multiview_mixin; its numbers: test_zero123plus_parity."""

import numpy as np
import pytest
import torch
from conftest import build_multiview
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from one2345pp.errors import InputError
from one2345pp.geometry.tile import composite_on_grey
from one2345pp.geometry.views import Views
from one2345pp.models.attention_reference import reference_attention
from one2345pp.pipelines.pipeline_multiview_tile import MultiViewTilePipeline


def build(**settings) -> MultiViewTilePipeline:
    """With a scheduler that draws noise, too."""
    pipe = build_multiview(**settings)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture
def pipe() -> MultiViewTilePipeline:
    return build()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (24, 24, 4), np.uint8)) for _ in range(2)]


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def latent(pipe, image, **kwargs) -> torch.Tensor:
    kwargs.setdefault("generator", seed())
    return pipe(image, output_type="latent", **kwargs).images


# --- a call is nothing but a call -------------------------------------------------------------------------------------


def test_interrupt_stops_the_steps(pipe, images):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return {}

    latent(pipe, images[0], num_inference_steps=4, callback_on_step_end=stop)
    assert steps == [0]


def test_call_leaves_components_as_they_were(pipe, images):
    """Even when the call fails half way."""

    def fail(*_):
        raise RuntimeError("stop")

    components = dict(pipe.components)
    processors = dict(pipe.unet.attn_processors)
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    latent(pipe, images[0])
    with pytest.raises(RuntimeError):
        latent(pipe, images[0], callback_on_step_end=fail)
    assert all(pipe.components[name] is component for name, component in components.items())
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert all(torch.equal(weights[name], value) for name, value in pipe.unet.state_dict().items())


# --- what Zero123++'s own pipeline gets wrong ------------------------------------------------------------------------


def test_generator_decides_every_draw(pipe, images):
    """Oracle: the global generator is neither read nor moved; another seed gives another tile."""
    first = latent(pipe, images[0], generator=seed(0))
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert torch.equal(first, latent(pipe, images[0], generator=seed(0)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.allclose(first, latent(pipe, images[0], generator=seed(1)))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_scheduler_swap_takes_effect_at_once(pipe, images, scheduler):
    """Oracle: after a call, a swapped scheduler gives what a fresh pipeline with that scheduler gives."""
    latent(pipe, images[0])
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    fresh = build()
    fresh.scheduler = scheduler.from_config(fresh.scheduler.config)
    swapped = latent(pipe, images[0])
    assert torch.equal(swapped, latent(fresh, images[0])) and swapped.isfinite().all()


def test_reference_is_noised_by_the_current_scheduler(pipe, images):
    """Oracle: add_noise of the registered scheduler is called once a step, with the step's own timestep."""
    seen = []

    class Spy(EulerAncestralDiscreteScheduler):
        def add_noise(self, original_samples, noise, timesteps):
            seen.append(timesteps.unique().item())
            return super().add_noise(original_samples, noise, timesteps)

    pipe.scheduler = Spy.from_config(pipe.scheduler.config)
    latent(pipe, images[0], num_inference_steps=3)
    assert seen == pipe.scheduler.timesteps.tolist()


def test_guidance_of_one_runs_no_second_branch(pipe, images):
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    latent(pipe, images[0], guidance_scale=1.0)
    assert set(batches) == {1}
    batches.clear()
    latent(pipe, images[0], guidance_scale=1.5)
    hook.remove()
    assert set(batches) == {2}


def test_guidance_interval(pipe, images):
    """Oracle: the second branch runs in the steps of the interval only; all steps are the default, none is guidance of one."""
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    middle = latent(pipe, images[0], num_inference_steps=4, guidance_interval=(0.25, 0.75))
    hook.remove()
    assert batches == [1, 1, 2, 2, 2, 2, 1, 1]  # a write and a read a step
    whole = latent(pipe, images[0], num_inference_steps=4)
    assert not torch.allclose(middle, whole, atol=1e-4)
    assert torch.equal(whole, latent(pipe, images[0], num_inference_steps=4, guidance_interval=(0.0, 1.0)))
    none = latent(pipe, images[0], num_inference_steps=4, guidance_interval=(0.5, 0.5))
    assert torch.equal(none, latent(pipe, images[0], num_inference_steps=4, guidance_scale=1.0))


def test_text_and_pictures_are_encoded_once(pipe, images):
    """However many tiles and branches: equal texts once, and the grey reference once."""
    seen = {"text_encoder": [], "vision_encoder": [], "vae.encoder": []}
    hooks = [
        pipe.components[name.split(".")[0]]
        .get_submodule(name.partition(".")[2])
        .register_forward_pre_hook(lambda module, args, kwargs, name=name: seen[name].append(len((*args, *kwargs.values())[0])),
                                   with_kwargs=True)
        for name in seen
    ]  # fmt: skip
    latent(pipe, images, num_images_per_prompt=2, num_inference_steps=3, guidance_scale=3.0)
    for hook in hooks:
        hook.remove()
    assert seen == {"text_encoder": [1], "vision_encoder": [2], "vae.encoder": [3]}


def test_call_without_numbers_uses_the_defaults_of_the_checkpoint(images):
    pipe = build(default_guidance_scale=2.5)
    assert torch.equal(latent(pipe, images[0]), latent(pipe, images[0], num_inference_steps=2, guidance_scale=2.5))
    assert pipe.num_timesteps == 2 and pipe.guidance_scale == 2.5


def test_prompt_and_image_reach_the_tile(pipe, images):
    base = latent(pipe, images[0])
    assert not torch.equal(base, latent(pipe, images[0], prompt="a red mug"))
    assert not torch.equal(base, latent(pipe, images[0], negative_prompt="blurred"))
    assert not torch.equal(base, latent(pipe, images[1]))


# --- images in and out -----------------------------------------------------------------------------------------------


def test_transparent_becomes_grey_and_opaque_stays():
    """Oracle: the two ends of alpha, and an opaque picture of every mode unchanged."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    flat = composite_on_grey(image)
    assert flat.mode == "RGB" and [flat.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (127, 127, 127)]
    white = Image.new("RGB", (2, 2), "white")
    assert composite_on_grey(white).tobytes() == white.tobytes()
    assert composite_on_grey(Image.new("L", (1, 1), 9)).getpixel((0, 0)) == (9, 9, 9)
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert composite_on_grey(palette).getpixel((0, 0)) == (127, 127, 127)


def test_rgba_equals_the_same_picture_on_grey(pipe, images):
    assert torch.equal(latent(pipe, images[0]), latent(pipe, composite_on_grey(images[0])))


def test_output_types_agree(pipe, images):
    """Oracle: one tile in four forms, and its cells, row by row; of pictures they are `Views`, with the rig's cameras."""
    outs = {kind: pipe(images, generator=seed(), output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    array = outs["np"].images
    assert array.shape == (2, 48, 32, 3) and outs["latent"].views is None
    np.testing.assert_allclose(outs["pt"].images.permute(0, 2, 3, 1).numpy(), array, atol=1e-6)
    np.testing.assert_allclose(np.stack([np.asarray(tile) for tile in outs["pil"].images]) / 255, array, atol=3e-3)
    for index in range(6):
        top, left = index // 2 * 16, index % 2 * 16
        cell = array[:, top : top + 16, left : left + 16]
        assert np.array_equal(outs["np"].views[:, index], cell)
        assert torch.equal(outs["pt"].views[:, index], outs["pt"].images[..., top : top + 16, left : left + 16])
        for tile, views in zip(outs["pil"].images, outs["pil"].views, strict=True):
            assert views[index].tobytes() == tile.crop((left, top, left + 16, top + 16)).tobytes()
    assert all(isinstance(views, Views) and views.rig.name == pipe.config.rig for views in outs["pil"].views)


@pytest.mark.parametrize("color", ["white", "grey"])
def test_transparent_views_keep_the_object(pipe, images, color, monkeypatch):
    """Oracle: a shaded ball on the tile's grey, white or of greys lighter and darker than the background's, comes back whole and
    alone; the tile stays opaque. What has the background's own grey at its outline needs normals: test_normals."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    inside = x**2 + y**2 < 0.6**2
    light = np.sqrt(np.clip(1 - x**2 - y**2, 0, 1)) + 0.2 * x
    value = np.full(x.shape, 255.0) if color == "white" else 60 + 130 * light * (1 - 0.7 * (x > 0.2))
    view = np.where(inside[..., None], value.clip(0, 255)[..., None].repeat(3, -1), 127) / 127.5 - 1
    tile = torch.from_numpy(np.tile(view, (3, 2, 1))).permute(2, 0, 1)[None].float()
    monkeypatch.setattr(pipe, "decode_latents", lambda latents: tile)
    out = pipe(images[0], height=192, width=128, transparent=True, num_inference_steps=1, generator=seed())
    assert out.images[0].mode == "RGB" and out.images[0].size == (128, 192)
    for cut in out.views[0]:
        assert cut.mode == "RGBA"
        alpha = np.asarray(cut)[..., 3] > 127
        assert (alpha & inside).sum() / (alpha | inside).sum() > 0.97


def test_height_and_width_are_of_the_tile(pipe, images):
    assert pipe(images[0], height=24, width=16, generator=seed()).images[0].size == (16, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "mug.png"}, "PIL"),
        ({"image": []}, "PIL"),
        ({"prompt": ["a", "b", "c"]}, "one an image"),
        ({"height": 50}, "multiple of 3"),
        ({"width": 31}, "multiple of 2"),
        ({"output_type": "jpg"}, "'latent'"),
        ({"control_image": Image.new("RGB", (4, 4))}, "ControlNet"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "shape"),
        ({"generator": [torch.Generator()] * 3}, "one a tile"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "expected some of"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"guidance_interval": (0.8, 0.2)}, "fractions"),
        ({"transparent": True, "output_type": "np"}, "output_type='pil'"),
    ],
)
def test_unusable_input_is_refused_with_what_to_do(pipe, images, arguments, message):
    with pytest.raises(InputError, match=message):
        pipe(**{"image": images[0], **arguments})


# --- reference attention ---------------------------------------------------------------------------------------------


def test_reference_attention_is_attention_over_both_token_sets(pipe):
    """Oracle: with the sample itself as the reference, every key is there twice, and softmax over twice the keys is the same mean."""
    sample, timestep = torch.randn(2, 4, 8, 8, generator=seed()), torch.tensor([5, 5])
    context = torch.randn(2, 4, 12, generator=seed())
    with torch.no_grad():
        plain = pipe.unet(sample, timestep, context).sample
        with reference_attention(pipe.unet) as passes:
            passes.write(sample, timestep, context)
            assert len(passes.tokens) == sum("attn1" in name for name in pipe.unet.attn_processors)
            same = passes.read(sample, timestep, context)
            passes.write(sample.flip(0), timestep, context)
            other = passes.read(sample, timestep, context)
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other, plain, atol=1e-4)


def test_gradients_reach_the_reference(pipe):
    reference = torch.randn(1, 4, 8, 8, generator=seed(), requires_grad=True)
    context, timestep = torch.zeros(1, 4, 12), torch.tensor([5])
    with reference_attention(pipe.unet) as passes:
        passes.write(reference, timestep, context)
        passes.read(torch.zeros(1, 4, 8, 8), timestep, context).sum().backward()
    assert reference.grad.abs().sum() > 0
