"""LoRA weights through diffusers' own loader, on stage 1 and on the chain."""

import numpy as np
import pytest
import torch
from conftest import multiview_components
from PIL import Image

from one2345pp import InputError, MultiViewTilePipeline


peft = pytest.importorskip("peft")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))


def make_pipe() -> MultiViewTilePipeline:
    pipe = MultiViewTilePipeline(**multiview_components(), view_size=16, default_num_inference_steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(PICTURE, prompt="a", generator=generator, output_type="latent", **kwargs).images


def assert_same(a, b) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def differs(a, b) -> bool:
    return not torch.allclose(a, b, atol=1e-3, rtol=1e-3)


def random_lora(model, seed: int, targets: list[str]) -> dict:
    """Random LoRA weights for a model, which is used up."""
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), model)
    layers = peft.get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in layers.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two saved LoRAs of the UNet."""
    root, targets = tmp_path_factory.mktemp("lora"), ["to_q", "to_k", "to_v", "to_out.0"]
    for seed, name in enumerate(("one", "two")):
        layers = random_lora(multiview_components()["unet"], seed, targets)
        MultiViewTilePipeline.save_lora_weights(root / name, unet_lora_layers=layers)
    return root


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return draw(make_pipe())


def test_load_scale_and_unload(folders, base):
    """Oracle: the LoRA changes the tile, less with half its scale, not with scale zero or after it is unloaded; a call's scale
    does not outlive the call, even when that fails half way."""
    pipe = make_pipe()
    pipe.load_lora_weights(folders / "one")
    full = draw(pipe)
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert differs(full, base) and differs(half, full) and differs(half, base)
    assert_same(draw(pipe, cross_attention_kwargs={"scale": 0.0}), base)

    def fail(*_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        draw(pipe, cross_attention_kwargs={"scale": 0.5}, callback_on_step_end=fail)
    assert_same(draw(pipe), full)
    pipe.unload_lora_weights()
    assert_same(draw(pipe), base)


def test_both_passes_use_the_lora(folders):
    """Oracle: with the LoRA on the write pass alone switched off, the tile differs, so the write pass, too, runs with the LoRA."""
    pipe = make_pipe()
    pipe.load_lora_weights(folders / "one")
    full, calls = draw(pipe), []

    def write_without(module, args, kwargs):
        calls.append(1)
        scale = {"scale": 0.0} if len(calls) % 2 else None
        return args, {**kwargs, "cross_attention_kwargs": scale}

    hook = pipe.unet.register_forward_pre_hook(write_without, with_kwargs=True)
    partly = draw(pipe)
    hook.remove()
    assert differs(partly, full)


def test_several_adapters(folders, base):
    """Oracle: weights 1 and 0 are the one adapter, 0 and 1 the other; adapters that are deleted or disabled do nothing."""
    pipe, alone = make_pipe(), {}
    for name in ("one", "two"):
        pipe.load_lora_weights(folders / name, adapter_name=name)
        pipe.set_adapters(name)
        alone[name] = draw(pipe)
    assert pipe.get_list_adapters() == {"unet": ["one", "two"]}
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert_same(draw(pipe), alone["one"])
    pipe.set_adapters(["one", "two"], [0.7, 0.7])
    both = draw(pipe)
    assert differs(both, alone["one"]) and differs(both, alone["two"])
    pipe.disable_lora()
    assert_same(draw(pipe), base)
    pipe.enable_lora()
    pipe.delete_adapters("one")
    pipe.set_adapters("two")
    assert_same(draw(pipe), alone["two"])


def test_fuse_unfuse_and_save(folders, base, tmp_path):
    """Oracle: fused and unloaded, the weights draw what the LoRA drew, also from disk; unfused, they are the old ones. A pipeline
    with a LoRA in it is not saved, because its folder would lack the weights below the LoRA."""
    pipe = make_pipe()
    pipe.load_lora_weights(folders / "one")
    full = draw(pipe)
    with pytest.raises(InputError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    pipe.fuse_lora()
    assert_same(draw(pipe, cross_attention_kwargs={"scale": 0.3}), full)
    pipe.unfuse_lora()
    assert_same(draw(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    loaded = MultiViewTilePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same(draw(loaded), full)


def test_text_encoder_lora_and_its_scale(base):
    """Oracle: a LoRA in the text encoder changes the tile, and with scale zero does not; the scale is put back. It is injected
    here: loading one takes transformers' own check of the version of peft."""
    pipe = make_pipe()
    random_lora(pipe.text_encoder, 2, ["q_proj", "v_proj"])
    with torch.no_grad():
        for name, value in pipe.text_encoder.named_parameters():
            if "lora_B" in name:
                value.fill_(1.0)
    full = draw(pipe)
    assert differs(full, base)
    assert_same(draw(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    assert_same(draw(pipe), full)


def test_chain(folders, tiny_chain, tmp_path):
    """Oracle: loaded into the chain, the LoRA changes its views as it does those of stage 1, and not with scale zero."""
    image = Image.new("RGB", (16, 16), "white")
    image.paste((200, 60, 40), (4, 4, 12, 12))

    def views(**kwargs) -> np.ndarray:
        out = tiny_chain(image, refine=False, generator=torch.Generator().manual_seed(0), **kwargs)
        return np.stack([np.asarray(view) for view in out.views[0]])

    before = views()
    tiny_chain.load_lora_weights(folders / "one", adapter_name="one")
    after = views()
    assert not np.array_equal(after, before)
    assert np.array_equal(views(cross_attention_kwargs={"scale": 0.0}), before)
    assert tiny_chain.multiview.get_list_adapters() == tiny_chain.get_list_adapters() == {"unet": ["one"]}
    with pytest.raises(InputError, match="unload_lora_weights"):
        tiny_chain.save_pretrained(tmp_path)
    tiny_chain.fuse_lora()
    tiny_chain.unload_lora_weights()
    assert np.abs(views().astype(int) - after.astype(int)).max() <= 2
    tiny_chain.save_pretrained(tmp_path)
