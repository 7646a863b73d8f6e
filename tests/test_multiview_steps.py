"""Every step of the stage 1 pipeline, called alone on a pipeline that has drawn nothing yet, and the role that it plays in a chain."""

# B pictures, n tiles a picture, L text tokens, D width of the text context

import numpy as np
import pytest
import torch
from conftest import build_multiview, multiview_components
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from one2345pp import CameraRig, InputError, MultiViewTilePipeline, Views
from one2345pp.geometry.tile import BACKGROUND, composite_on_grey, make_tile
from one2345pp.models.attention_reference import reference_attention


RIGS = ["zero123plus-v1.2", "zero123plus-v1.1"]
SCALE = 0.5 / 0.8  # of pixels, Zero123++'s


@pytest.fixture
def pipe() -> MultiViewTilePipeline:
    return build_multiview()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(2)]


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def noise(*shape: int, value: int = 7) -> Tensor:
    return torch.randn(shape, generator=seed(value))


def with_masks() -> dict:
    """Components whose autoencoder carries the object's mask in a fourth channel."""
    parts = multiview_components()
    torch.manual_seed(0)
    parts["vae"] = AutoencoderKL.from_config(parts["vae"].config, in_channels=4, out_channels=4).eval()
    return parts


def with_rigs() -> dict:
    """Components whose UNet knows two rigs."""
    parts = multiview_components()
    torch.manual_seed(0)
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, num_class_embeds=2).eval()
    return parts


# --- each alone -------------------------------------------------------------------------------------------------------


def test_check_inputs(pipe, images):
    """Oracle: the size of six views, or as asked; what a call refuses is refused here, before a call."""
    assert pipe.check_inputs(images=images) == (48, 32)
    assert pipe.check_inputs(images=images, height=24, width=16, latents=torch.zeros(2, 4, 12, 8)) == (24, 16)
    with pytest.raises(InputError, match=r"expected \(6, 4, 24, 16\)"):
        pipe.check_inputs(images=images, num_images_per_prompt=3, latents=torch.zeros(2, 4, 24, 16))
    with pytest.raises(TypeError, match="positional"):
        pipe.check_inputs(images)


@torch.no_grad()
def test_encode_prompt(pipe):
    """Oracle: the text encoder's last hidden states, text by text."""
    positive, negative = pipe.encode_prompt(["a", "a a"], "aa")

    def encode(text: str) -> Tensor:
        ids = pipe.tokenizer(text, padding="max_length", max_length=4, return_tensors="pt").input_ids
        return pipe.text_encoder(ids).last_hidden_state

    torch.testing.assert_close(positive, torch.cat([encode("a"), encode("a a")]))
    torch.testing.assert_close(negative, encode("aa").expand(2, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("coefficients", [None, [0.9, 0.1, 0.5, 0.2]])
def test_prepare_context(images, coefficients):
    """Oracle: text plus the image's vector times the share of each token, `i / L` if the weights have none of their own; with guidance
    the negative text alone comes first. Repeats of a picture stand together."""
    pipe = build_multiview(ramping_coefficients=coefficients)
    context = pipe.prepare_context(images, ["a", "aa"], ["", "a a"], num_images_per_prompt=2)
    pixels = pipe.feature_extractor_clip(images, return_tensors="pt").pixel_values
    vectors = pipe.vision_encoder(pixels).image_embeds[:, None]
    shares = torch.tensor(coefficients or [0.0, 0.25, 0.5, 0.75])[:, None]
    texts, negative = pipe.encode_prompt(["a", "aa"], ["", "a a"])
    expected = (texts + shares * vectors).repeat_interleave(2, 0)
    torch.testing.assert_close(context, expected)
    pipe._guidance_scale = 3.0
    context = pipe.prepare_context(images, texts, ["", "a a"], num_images_per_prompt=2)
    torch.testing.assert_close(context, torch.cat([negative.repeat_interleave(2, 0), expected]))


@torch.no_grad()
def test_prepare_reference(pipe, images):
    """Oracle: a draw of the autoencoder's posterior of the pictures in Zero123++'s scale, without the autoencoder's own factor; with
    guidance the empty picture's, of pixels of zero, comes first."""
    reference = pipe.prepare_reference(images, 1, seed())
    pixels = pipe.feature_extractor_vae(images, return_tensors="pt").pixel_values
    raw = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    torch.testing.assert_close(pixels, raw * SCALE, atol=1e-5, rtol=1e-5)
    posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(reference, posterior.sample(seed()))
    pipe._guidance_scale = 3.0
    reference = pipe.prepare_reference(images, 1, (generator := seed()))
    empty = pipe.vae.encode(torch.zeros(2, 3, 16, 16)).latent_dist.sample(again := seed())
    torch.testing.assert_close(reference, torch.cat([empty, posterior.sample(again)]), atol=1e-5, rtol=1e-5)
    assert torch.equal(generator.get_state(), again.get_state())


def test_prepare_reference_with_masks(images):
    """Oracle: what the autoencoder is shown, the picture on grey and its alpha as the fourth channel, -1 to 1, in one scale."""
    pipe, seen = build_multiview(with_masks()), []
    cover = np.zeros((16, 16), np.uint8)
    cover[4:12, 2:14] = 255
    picture = images[0].copy()
    picture.putalpha(Image.fromarray(cover))
    pipe.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipe._guidance_scale = 3.0
    pipe.prepare_reference([picture])
    empty, pixels = seen[0]
    mask = torch.from_numpy(cover.astype(np.float32)) / 127.5 - 1
    torch.testing.assert_close(pixels[3], mask * SCALE, atol=1e-5, rtol=1e-5)
    rgb = np.asarray(composite_on_grey(picture), np.float32) / 127.5 - 1
    torch.testing.assert_close(pixels[:3], torch.from_numpy(rgb).permute(2, 0, 1) * SCALE, atol=1e-5, rtol=1e-5)
    assert not empty[:3].any() and torch.allclose(empty[3], torch.tensor(-SCALE))


def test_prepare_latents(pipe):
    """Oracle: unit noise of the generator, or as given, times the scheduler's first sigma, which Euler's is not 1."""
    drawn = noise(2, 4, 24, 16, value=0)
    assert torch.equal(pipe.prepare_latents(2, 48, 32, seed()), drawn)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    sigma = pipe.scheduler.init_noise_sigma
    assert sigma > 2
    for latents in (pipe.prepare_latents(2, 48, 32, seed()), pipe.prepare_latents(2, 48, 32, latents=drawn)):
        torch.testing.assert_close(latents, drawn * sigma)
    with pytest.raises(InputError, match="latents"):
        pipe.prepare_latents(1, 48, 32, latents=drawn)


def test_noise_reference(pipe):
    """Oracle: the formula of the forward diffusion, `sqrt(a) x + sqrt(1 - a) e`, with fresh noise for the second branch."""
    reference, timestep = noise(4, 4, 8, 8), torch.tensor(600)
    a = pipe.scheduler.alphas_cumprod[600]
    generator = seed()
    draws = [torch.randn((2, 4, 8, 8), generator=generator) for _ in range(2)]
    noised = pipe.noise_reference(reference, timestep, seed(), branches=2)
    torch.testing.assert_close(noised, a.sqrt() * reference + (1 - a).sqrt() * torch.cat(draws), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", [None, 3.0])
def test_predict(pipe, scale):
    """Oracle: the UNet's passes by hand at the scheduler's own timestep, each branch alone: `n + s (p - n)`, of which the negative one
    comes first; without guidance, as on a new pipeline, the last branch alone."""
    latents, context, reference = noise(1, 4, 24, 16), noise(2, 4, 12, value=8), noise(2, 4, 8, 8, value=9)
    timestep = pipe.scheduler.timesteps[300]
    noised = pipe.noise_reference(
        reference[-1:] if scale is None else reference, timestep, seed(), 1 if scale is None else 2
    )

    def one(branch: int) -> Tensor:
        with reference_attention(pipe.unet) as passes:
            passes.write(noised[[branch]], timestep, context[[branch]])
            return passes.read(latents, timestep, context[[branch]])

    expected = one(-1) if scale is None else one(0) + scale * (one(1) - one(0))
    if scale is not None:
        pipe._guidance_scale = scale
    with reference_attention(pipe.unet) as passes:
        found = pipe.predict(passes, latents, 300, context, reference, seed())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decode_latents(pipe):
    """Oracle: the autoencoder's decoder, and Zero123++'s scale of pixels undone."""
    latents = noise(1, 4, 24, 16)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(pipe.decode_latents(latents), decoded / SCALE)


def test_cut_out_by_masks():
    """Oracle: known colours and masks, of two tiles whose views differ: half covered is half opaque, and free of the grey that it was
    mixed with. Cameras stay."""
    pipe, rig = build_multiview(with_masks()), CameraRig.named(RIGS[1])
    cover = torch.rand(2, 1, 3, 2, generator=seed()).mul(0.8).add(0.2)
    cover = cover.repeat_interleave(16, 2).repeat_interleave(16, 3)
    rgb = cover * torch.tensor([1.0, -1.0, 0.2]).view(1, 3, 1, 1)  # on grey, which is 0
    tiles = [(one.permute(1, 2, 0).numpy() + 1) * 127.5 for one in rgb]
    tiles = [Image.fromarray(tile.round().astype(np.uint8)) for tile in tiles]
    views = [Views(cells(tile), rig) for tile in tiles]
    cut = pipe.cut_out(views, torch.cat([rgb, 2 * cover - 1], 1))
    for index, six in enumerate(cut):
        assert isinstance(six, Views) and six.rig is rig
        for view, own in zip(six, cells(cover[index, 0].numpy()), strict=True):
            pixels = np.asarray(view).astype(float)
            np.testing.assert_allclose(pixels[..., 3], own * 255, atol=1)
            np.testing.assert_allclose(pixels[..., :3], np.broadcast_to([255, 0, 153], (16, 16, 3)), atol=6)


def test_cut_out_by_the_background(pipe):
    """Oracle: without masks, a square on the tile's grey comes back alone, with the place that it has in its view."""
    views = [Image.new("RGB", (16, 16), BACKGROUND) for _ in range(6)]
    for index, view in enumerate(views):
        view.paste((200, 40, 30), (2 + index, 4, 9 + index, 12))
    (six,) = pipe.cut_out([Views(views, RIGS[0])], torch.zeros(1, 3, 48, 32))
    for index, view in enumerate(six):
        solid = np.asarray(view)[..., 3] > 127
        expected = np.zeros((16, 16), bool)
        expected[4:12, 2 + index : 9 + index] = True
        assert np.array_equal(solid, expected)


def cells(tile) -> list:
    """The six views of a tile, 16 pixels each, row by row."""
    corners = [(row * 16, column * 16) for row in range(3) for column in range(2)]
    if isinstance(tile, Image.Image):
        return [tile.crop((x, y, x + 16, y + 16)) for y, x in corners]
    return [tile[y : y + 16, x : x + 16] for y, x in corners]


# --- together ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("small", [False, True])
def test_the_steps_by_hand_make_the_tile_of_a_call(images, scale, small):
    """Oracle: the call, to the last bit. Nothing but the public steps, one after another, on another pipeline; also with what a small
    first stage does otherwise."""
    settings, texts = {"clean_reference": small, "tile_positions": small}, {"prompt": "a", "negative_prompt": "aa"}
    call = {"num_inference_steps": 3, "guidance_scale": scale, "output_type": "pt", **texts}
    expected = build_multiview(**settings)(images, generator=seed(), **call).images
    pipe, generator = build_multiview(**settings), seed()
    height, width = pipe.check_inputs(images=images, **texts)
    pipe._guidance_scale = scale
    pipe.scheduler.set_timesteps(3)
    context = pipe.prepare_context(images, ["a"] * 2, ["aa"] * 2)
    reference = pipe.prepare_reference(images, 1, generator)
    latents = pipe.prepare_latents(2, height, width, generator)
    with reference_attention(pipe.unet, (3, 2) if small else None) as passes:
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            prediction = pipe.predict(passes, latents, step, context, reference, generator)
            latents = pipe.scheduler.step(prediction, timestep, latents, generator=generator).prev_sample
    tiles = pipe.decode_latents(latents / 0.75 + 0.22)  # Zero123++'s scale of latents undone
    assert torch.equal(expected, (tiles / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("rig", [None, *RIGS])
@pytest.mark.parametrize("masks", [False, True])
def test_draw(images, rig, masks):
    """Oracle: the views of a transparent call, and the cameras of the rig that was asked for, else of the first."""
    parts = with_rigs() | ({"vae": with_masks()["vae"]} if masks else {})
    pipe = build_multiview(parts, rigs=RIGS)
    views = pipe.draw(images[0], generator=seed(), rig=rig, num_inference_steps=1)
    assert isinstance(views, Views) and {view.mode for view in views} == {"RGBA"}
    cameras = CameraRig.named(rig or RIGS[0])
    assert torch.equal(views.rig.camera_to_world, cameras.camera_to_world) and torch.equal(views.rig.fov, cameras.fov)
    out = pipe(images[0], generator=seed(), rig=rig, num_inference_steps=1, transparent=True)
    assert make_tile(views.images).tobytes() == make_tile(out.views[0].images).tobytes()
    assert out.images[0].mode == "RGB" and out.views[0].rig.name == (rig or RIGS[0])


# --- a call that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_failure_inside_the_unet_leaves_nothing_behind(images, clean, fails):
    """Oracle: the next call's tile is that of before, to the last bit, and the UNet has its own attention processors again. The
    exception comes from the middle of the UNet, in a pass over the input or one over the tile, in the first step or a later one."""
    pipe = build_multiview(clean_reference=clean)

    def draw() -> Tensor:
        return pipe(images[0], generator=seed(), guidance_scale=2.0, output_type="latent", num_inference_steps=3).images

    before, processors, passes = draw(), dict(pipe.unet.attn_processors), []

    def fail(*_):
        passes.append(len(passes))
        if passes[-1] == fails:
            raise RuntimeError("out of memory")

    hook = pipe.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        draw()
    hook.remove()
    assert passes == list(range(fails + 1))
    assert pipe.unet.attn_processors.keys() == processors.keys()
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(draw(), before)
