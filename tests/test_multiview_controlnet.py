"""ControlNets in stage 1 and in the chain: what they see, when they act, how they are saved. Numbers: test_zero123plus_parity."""

import json

import numpy as np
import pytest
import torch
from conftest import build_multiview, multiview_components
from diffusers import ControlNetModel, DiffusionPipeline, MultiControlNetModel
from PIL import Image

from one2345pp import InputError, MultiViewTilePipeline, One2345PlusPlusPipeline


SIZE = (32, 48)


def make_controlnet(unet, seed: int = 0) -> ControlNetModel:
    """With random weights where a new one has zeros."""
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            block.weight.copy_(torch.randn(block.weight.shape, generator=generator))
        out = controlnet.controlnet_cond_embedding.conv_out
        out.weight.copy_(torch.randn(out.weight.shape, generator=generator))
    return controlnet.eval()


@pytest.fixture(scope="module")
def components():
    parts = multiview_components()
    return {**parts, "controlnet": make_controlnet(parts["unet"])}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """An input, and two control tiles."""
    rng = np.random.default_rng(0)
    tiles = [Image.fromarray(rng.integers(0, 255, (48, 32, 3), np.uint8)) for _ in range(2)]
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)), *tiles]


def make_pipe(components, **changes) -> MultiViewTilePipeline:
    return build_multiview({**components, **changes})


def draw(pipe, image, seed: int = 0, **kwargs) -> torch.Tensor:
    kwargs = {"generator": torch.Generator().manual_seed(seed), "output_type": "latent", **kwargs}
    return pipe(image, **kwargs).images


def close(a, b) -> bool:
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_controlnet_rests_without_picture_and_without_weight(components, pictures):
    """Oracle: no control picture, a weight of zero, or no step to act in give what the pipeline without a ControlNet gives;
    otherwise the picture decides."""
    image, tile, other = pictures
    pipe, plain = make_pipe(components), draw(make_pipe(components, controlnet=None), image)
    calls = []
    hook = components["controlnet"].register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(draw(pipe, image), plain)
    assert torch.equal(draw(pipe, image, control_image=tile, controlnet_conditioning_scale=0.0), plain)
    assert torch.equal(draw(pipe, image, control_image=tile, control_guidance_end=0.1), plain)
    assert not calls
    steered = draw(pipe, image, control_image=tile)
    hook.remove()
    assert len(calls) == 2
    assert not close(steered, plain) and not close(steered, draw(pipe, image, control_image=other))


def test_share_of_the_steps(components, pictures):
    """The ControlNet is called in the steps that lie in its share, and in no others."""
    image, tile, _ = pictures
    pipe, seen = make_pipe(components), []
    hook = pipe.controlnet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    draw(pipe, image, num_inference_steps=4, control_image=tile, control_guidance_start=0.25, control_guidance_end=0.75)
    hook.remove()
    assert seen == pipe.scheduler.timesteps.tolist()[1:3]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_controlnet_sees_what_the_read_pass_sees(components, pictures, guidance_scale):
    """Oracle: same sample, timestep and context as the UNet's read pass, of both branches; the write pass gets no residuals."""
    image, tile, _ = pictures
    pipe, seen = make_pipe(components), {"unet": [], "controlnet": []}
    hooks = [
        getattr(pipe, name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append((args, kwargs)), with_kwargs=True
        )
        for name in seen
    ]
    draw(pipe, image, num_inference_steps=1, guidance_scale=guidance_scale, control_image=tile)
    for hook in hooks:
        hook.remove()
    (write, read), (control,) = seen["unet"], seen["controlnet"]
    assert "mid_block_additional_residual" not in write[1] and "mid_block_additional_residual" in read[1]
    assert torch.equal(control[0][0], read[0][0]) and torch.equal(control[0][1], read[0][1])
    assert torch.equal(control[1]["encoder_hidden_states"], read[1]["encoder_hidden_states"])
    pixels = control[1]["controlnet_cond"]
    assert pixels.shape == (len(read[0][0]), 3, 48, 32)
    expected = torch.from_numpy(np.asarray(tile, np.float32)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected.expand_as(pixels))


def test_batch_with_a_picture_an_image(components, pictures):
    """Oracle: each tile of a batch is the tile that its image and control picture give alone."""
    image, *tiles = pictures
    pipe = make_pipe(components)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    batch = draw(
        pipe, [image, image], control_image=tiles, num_images_per_prompt=2, generator=generators, guidance_scale=2.0
    )
    alone = draw(pipe, image, seed=2, control_image=tiles[1], guidance_scale=2.0)
    torch.testing.assert_close(batch[2:3], alone, atol=1e-4, rtol=1e-4)


def test_several_controlnets_add_up(components, pictures):
    """Oracle: of two networks, one with weight zero or outside its share leaves the other's tile; both together differ."""
    image, tile, other = pictures
    second = make_controlnet(components["unet"], seed=1)
    pipe = make_pipe(components, controlnet=[components["controlnet"], second])
    assert isinstance(pipe.controlnet, MultiControlNetModel)
    both = {"control_image": [tile, other]}
    first = draw(make_pipe(components), image, control_image=tile)
    assert close(draw(pipe, image, **both, controlnet_conditioning_scale=[1.0, 0.0]), first)
    assert close(draw(pipe, image, **both, control_guidance_end=[1.0, 0.0]), first)
    alone = draw(make_pipe(components, controlnet=second), image, control_image=other)
    assert close(draw(pipe, image, **both, controlnet_conditioning_scale=[0.0, 1.0]), alone)
    assert not close(draw(pipe, image, **both), first)


@pytest.mark.parametrize("count", [1, 2])
def test_saved_with_and_loads_without(components, pictures, count, tmp_path):
    """Oracle: saved and loaded, by our class and by diffusers', the pipeline draws the same; nothing tells where weights came from."""
    image, *tiles = pictures
    networks = [components["controlnet"], make_controlnet(components["unet"], seed=1)][:count]
    for index, network in enumerate(networks):
        network.save_pretrained(tmp_path / f"network{index}")
    networks = [ControlNetModel.from_pretrained(tmp_path / f"network{index}") for index in range(count)]
    kwargs = {"control_image": tiles if count > 1 else tiles[0]}
    pipe = make_pipe(components, controlnet=networks if count > 1 else networks[0])
    before = draw(pipe, image, **kwargs)
    pipe.save_pretrained(tmp_path / "saved")
    ours = MultiViewTilePipeline.from_pretrained(tmp_path / "saved")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for loaded in (ours, theirs):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.controlnet) is type(pipe.controlnet)
        assert close(draw(loaded, image, **kwargs), before)
    for config in (tmp_path / "saved").glob("*/config.json"):
        assert str(tmp_path) not in config.read_text()


def test_folder_without_controlnet_takes_one(components, pictures, tmp_path):
    """A folder that never heard of ControlNets loads as it is, and with one that is passed."""
    image, tile, _ = pictures
    make_pipe(components, controlnet=None).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("controlnet") == [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert MultiViewTilePipeline.from_pretrained(tmp_path).controlnet is None
    loaded = MultiViewTilePipeline.from_pretrained(tmp_path, controlnet=components["controlnet"])
    loaded.set_progress_bar_config(disable=True)
    assert close(draw(loaded, image, control_image=tile), draw(make_pipe(components), image, control_image=tile))


def test_chain_with_a_controlnet(tiny_chain, tiny_chain_folder, pictures, tmp_path):
    """The chain draws its views with the ControlNet and the control picture, also after it was saved and loaded."""
    image = Image.new("RGB", (16, 16), "white")
    image.paste((200, 60, 40), (4, 4, 12, 12))
    tiny_chain.register_modules(controlnet=make_controlnet(tiny_chain.unet))
    assert tiny_chain.multiview.controlnet is tiny_chain.controlnet

    def views(chain, **kwargs):
        stage = chain.multiview
        return np.stack(
            [np.asarray(v) for v in stage(image, generator=torch.Generator().manual_seed(0), **kwargs).views[0]]
        )

    tiny_chain.save_pretrained(tmp_path)
    loaded = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    steered = views(tiny_chain, control_image=pictures[1])
    assert np.array_equal(steered, views(loaded, control_image=pictures[1]))
    assert not np.array_equal(steered, views(tiny_chain))
    out = loaded(image, refine=False, generator=torch.Generator().manual_seed(0), control_image=pictures[1])
    base = loaded(image, refine=False, generator=torch.Generator().manual_seed(0))
    weak = loaded(
        image,
        refine=False,
        generator=torch.Generator().manual_seed(0),
        control_image=pictures[1],
        controlnet_conditioning_scale=0.0,
    )
    assert np.asarray(out.views[0][0]).tobytes() != np.asarray(base.views[0][0]).tobytes()
    assert np.asarray(weak.views[0][0]).tobytes() == np.asarray(base.views[0][0]).tobytes()
    assert One2345PlusPlusPipeline.from_pretrained(tiny_chain_folder).controlnet is None
    assert One2345PlusPlusPipeline.from_stages(loaded.multiview, loaded.volume).controlnet is loaded.controlnet


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_image": "tile.png"}, "got 1 \\(str\\)"),
        ({"control_image": [Image.new("RGB", SIZE)] * 2}, "got 2"),
        ({"control_image": Image.new("RGB", (48, 48))}, "3 rows by 2 columns"),
        ({"controlnet_conditioning_scale": [1.0, 2.0]}, "one a ControlNet"),
        ({"control_guidance_start": 0.9, "control_guidance_end": 0.2}, "fractions"),
    ],
)
def test_unusable_control_is_refused(components, pictures, arguments, message):
    with pytest.raises(InputError, match=message):
        make_pipe(components)(pictures[0], **arguments)


def test_control_without_controlnet_is_refused(components, pictures):
    with pytest.raises(InputError, match="has no ControlNet"):
        make_pipe(components, controlnet=None)(pictures[0], control_image=pictures[1])
