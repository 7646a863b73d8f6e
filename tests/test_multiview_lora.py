"""LoRA weights on stage 1 and on the chain: what diffusers' `LoraTesterMixin` and `UNetLoraTesterMixin` check, under their names, and
what is this pipeline's own. Its `LoraMemoryTesterMixin`: test_multiview_memory."""

import logging
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
from conftest import build_multiview
from PIL import Image

from one2345pp import InputError, MultiViewTilePipeline


peft = pytest.importorskip("peft")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", autouse=True)
def any_peft():
    """transformers asks for the newest peft before it takes an adapter; what is checked here works with older ones, too."""
    from transformers.integrations import peft as integration

    patch = pytest.MonkeyPatch()
    patch.setattr(integration, "MIN_PEFT_VERSION", "0.15.0")
    yield
    patch.undo()


@pytest.fixture
def pipe() -> MultiViewTilePipeline:
    return build()


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return draw(build())


def build() -> MultiViewTilePipeline:
    return build_multiview(ramping_coefficients=[0.1, 0.2, 0.3, 0.4])


def adapt(pipe, names=tuple(TARGETS), adapter="default", **config) -> dict:
    """Give components an adapter with random weights, which its name decides; returns those components."""
    adapted = {name: getattr(pipe, name) for name in names}
    with torch.random.fork_rng():
        torch.manual_seed(sum(adapter.encode()))
        for name, model in adapted.items():
            settings = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS[name], "init_lora_weights": False}
            model.add_adapter(peft.LoraConfig(**settings | config), adapter_name=adapter)
    return adapted


def save(adapted: dict, folder, metadata: bool = False, **kwargs) -> None:
    for name, model in adapted.items():
        kwargs[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(model)
        if metadata:
            kwargs[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    MultiViewTilePipeline.save_lora_weights(folder, **kwargs)


def has_lora(model) -> bool:
    return any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())


def draw(pipe, scale: float | None = None, **kwargs) -> torch.Tensor:
    if scale is not None:
        kwargs["cross_attention_kwargs"] = {"scale": scale}
    generator = torch.Generator().manual_seed(0)
    return pipe(PICTURE, prompt="a", generator=generator, output_type="latent", guidance_scale=2.0, **kwargs).images


def assert_same(a, b) -> None:
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def assert_all_differ(*tiles) -> None:
    for index, a in enumerate(tiles):
        assert not any(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for b in tiles[index + 1 :])


@contextmanager
def warnings_of_the_loader(caplog):
    """diffusers keeps its log to itself, at a level that is the same for the whole process."""
    logger = logging.getLogger("diffusers.loaders.lora_base")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, logger=logger.name):
        yield
    logger.removeHandler(caplog.handler)


def check_scale(pipe, base) -> None:
    """Oracle: half a LoRA is neither all nor none of it, and none is the tile without."""
    full, half = draw(pipe), draw(pipe, 0.5)
    assert_all_differ(base, full, half)
    assert_same(draw(pipe, 0.0), base)
    assert_same(draw(pipe), full)  # the scale of a call does not outlive it


def check_unloaded(pipe, adapted: dict, base) -> None:
    """Oracle: no layer of a LoRA is left, and the tile is the one without."""
    assert all(has_lora(model) for model in adapted.values())
    assert_all_differ(draw(pipe), base)
    pipe.unload_lora_weights()
    assert not any(has_lora(model) for model in adapted.values())
    assert_same(draw(pipe), base)


def check_save_load(pipe, adapted: dict, base, folder, metadata: bool = False, **options) -> None:
    """Oracle: saved, unloaded and loaded again, it draws the same tile."""
    full = draw(pipe)
    save(adapted, folder, metadata, safe_serialization=not options.get("weight_name", FILE).endswith(".bin"))
    check_unloaded(pipe, adapted, base)
    pipe.load_lora_weights(folder, **options)
    assert all(has_lora(model) for model in adapted.values())
    assert_same(draw(pipe), full)


# --- on the text encoder alone ---------------------------------------------------------------------------------------


def test_simple_inference_with_text_lora(pipe, base):
    adapt(pipe, ["text_encoder"])
    assert_all_differ(draw(pipe), base)


def test_simple_inference_with_text_lora_and_scale(pipe, base):
    adapt(pipe, ["text_encoder"])
    check_scale(pipe, base)


def test_simple_inference_with_text_lora_unloaded(pipe, base):
    check_unloaded(pipe, adapt(pipe, ["text_encoder"]), base)


def test_simple_inference_with_text_lora_save_load(pipe, base, tmp_path):
    check_save_load(pipe, adapt(pipe, ["text_encoder"]), base, tmp_path)


def test_simple_inference_with_partial_text_lora(pipe, base, tmp_path):
    """Ranks that differ between matrices, and a matrix without; the metadata says which."""
    ranks = {name: 1 + index for index, name in enumerate(TARGETS["text_encoder"][:3])}
    adapted = adapt(pipe, ["text_encoder"], target_modules=list(ranks), rank_pattern=ranks)
    check_save_load(pipe, adapted, base, tmp_path, metadata=True)


def test_simple_inference_save_pretrained_with_text_lora(pipe, tmp_path):
    """Here a pipeline with a LoRA in it is not saved, because its folder would lack the weights below. Oracle: fused and unloaded, it
    is, and draws the same tile."""
    adapt(pipe)
    full = draw(pipe)
    with pytest.raises(InputError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    pipe.fuse_lora(components=list(TARGETS))
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    loaded = MultiViewTilePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same(draw(loaded), full)


# --- on text encoder and UNet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_low_cpu_mem_usage_with_loading(pipe, base, tmp_path, low_cpu_mem_usage):
    check_save_load(pipe, adapt(pipe), base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_simple_inference_with_text_denoiser_lora_save_load(pipe, base, tmp_path):
    check_save_load(pipe, adapt(pipe), base, tmp_path, weight_name="pytorch_lora_weights.bin")


def test_simple_inference_with_text_denoiser_lora_and_scale(pipe, base):
    adapt(pipe)
    check_scale(pipe, base)
    scales = {
        module.scaling["default"] for name in TARGETS for module in getattr(pipe, name).modules() if hasattr(module, "scaling")
    }  # fmt: skip
    assert scales == {1.0}


def test_simple_inference_with_text_denoiser_lora_unloaded(pipe, base):
    check_unloaded(pipe, adapt(pipe), base)


def test_lora_fuse_unfuse(pipe, base):
    """Oracle: fused, the tile is the LoRA's, whatever scale a call asks for; unfused, the LoRA can be scaled again."""
    adapted = adapt(pipe)
    full = draw(pipe)
    pipe.fuse_lora(components=list(TARGETS))
    assert pipe.num_fused_loras == 1 and all(has_lora(model) for model in adapted.values())
    assert_same(draw(pipe), full)
    assert_same(draw(pipe, 0.3), full)
    pipe.unfuse_lora(components=list(TARGETS))
    assert pipe.num_fused_loras == 0
    assert_same(draw(pipe), full)
    assert_same(draw(pipe, 0.0), base)


@pytest.mark.parametrize("lora_scale", [1.0, 0.8])
def test_lora_scale_kwargs_match_fusion(pipe, base, lora_scale):
    adapt(pipe)
    scaled = draw(pipe, lora_scale)
    assert_all_differ(scaled, base)
    pipe.fuse_lora(components=list(TARGETS), adapter_names=["default"], lora_scale=lora_scale)
    assert_same(draw(pipe), scaled)


def test_set_adapters_match_attention_kwargs(pipe, base):
    adapt(pipe)
    scaled = draw(pipe, 0.5)
    assert_all_differ(scaled, base, draw(pipe))
    pipe.set_adapters("default", 0.5)
    assert_same(draw(pipe), scaled)


def test_logs_info_when_no_lora_keys_found(pipe, base, caplog):
    nothing = {"lora_foo": torch.tensor(2.0), "lora_bar": torch.tensor(3.0)}
    pipe.load_lora_weights(dict(nothing))
    assert_same(draw(pipe), base)
    with warnings_of_the_loader(caplog):
        pipe.load_lora_into_text_encoder(
            nothing, network_alphas=None, text_encoder=pipe.text_encoder, prefix="text_encoder"
        )
    assert "No LoRA keys associated to CLIPTextModel" in caplog.text


@pytest.mark.parametrize("lora_alpha", [4, 8, 16])
def test_lora_adapter_metadata_is_loaded_correctly(pipe, tmp_path, lora_alpha):
    save(adapt(pipe, lora_alpha=lora_alpha), tmp_path, metadata=True)
    *_, metadata = pipe.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert {name: metadata[f"{name}.lora_alpha"] for name in TARGETS} == dict.fromkeys(TARGETS, lora_alpha)
    assert all(set(metadata[f"{name}.target_modules"]) == set(modules) for name, modules in TARGETS.items())


@pytest.mark.parametrize("lora_alpha", [4, 8, 16])
def test_lora_adapter_metadata_save_load_inference(pipe, base, tmp_path, lora_alpha):
    """Oracle: the tile, which alpha changes, so what was saved has it."""
    save(adapt(pipe, lora_alpha=lora_alpha), tmp_path, metadata=True)
    full = draw(pipe)
    fresh = build()
    fresh.load_lora_weights(tmp_path)
    assert_all_differ(full, base)
    assert_same(draw(fresh), full)


def test_lora_unload_add_adapter(pipe):
    adapt(pipe)
    full = draw(pipe)
    pipe.unload_lora_weights()
    adapt(pipe)
    assert_same(draw(pipe), full)


def test_inference_load_delete_load_adapters(pipe, base, tmp_path):
    save(adapt(pipe), tmp_path)
    full = draw(pipe)
    pipe.delete_adapters(pipe.get_active_adapters()[0])
    assert_same(draw(pipe), base)
    pipe.load_lora_weights(tmp_path)
    assert_same(draw(pipe), full)


# --- several adapters ------------------------------------------------------------------------------------------------


@pytest.fixture
def several(pipe) -> dict[str, torch.Tensor]:
    """Two adapters on text encoder and UNet, and the tiles of each alone and of both."""
    tiles = {}
    for name in ("one", "two"):
        adapt(pipe, adapter=name)
        pipe.set_adapters(name)
        tiles[name] = draw(pipe)
    pipe.set_adapters(["one", "two"])
    return tiles | {"both": draw(pipe)}


def test_simple_inference_with_text_denoiser_multi_adapter(pipe, base, several):
    assert_all_differ(base, *several.values())
    pipe.disable_lora()
    assert_same(draw(pipe), base)
    pipe.enable_lora()
    assert_same(draw(pipe), several["both"])


def test_simple_inference_with_text_denoiser_multi_adapter_weighted(pipe, base, several):
    """Oracle: weights of 1 and 0 are the one alone."""
    pipe.set_adapters(["one", "two"], [0.5, 0.6])
    assert_all_differ(base, *several.values(), draw(pipe))
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert_same(draw(pipe), several["one"])


def test_simple_inference_with_text_denoiser_multi_adapter_delete_adapter(pipe, base, several):
    pipe.delete_adapters("one")
    assert_same(draw(pipe), several["two"])
    pipe.delete_adapters("two")
    assert_same(draw(pipe), base)
    for name in ("one", "two"):
        adapt(pipe, adapter=name)
    pipe.set_adapters(["one", "two"])
    assert_same(draw(pipe), several["both"])
    pipe.delete_adapters(["one", "two"])
    assert_same(draw(pipe), base)


def test_simple_inference_with_text_lora_denoiser_fused_multi(pipe, several):
    for names, tile in ((["one"], several["one"]), (["two", "one"], several["both"])):
        pipe.set_adapters(names)
        pipe.fuse_lora(components=list(TARGETS), adapter_names=names)
        assert pipe.num_fused_loras == len(names)
        assert_same(draw(pipe), tile)
        pipe.unfuse_lora(components=list(TARGETS))
        assert pipe.num_fused_loras == 0


def test_wrong_adapter_name_raises_error(pipe, several):
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        pipe.set_adapters("three")
    assert_same(draw(pipe), several["both"])


def test_multiple_wrong_adapter_name_raises_error(pipe, several, caplog):
    """diffusers warns of components that there are not, and goes on."""
    with warnings_of_the_loader(caplog):
        pipe.set_adapters("one", {"foo": 0.0, "bar": 0.0})
    assert "not part of the pipeline: ['bar', 'foo']" in caplog.text
    assert_same(draw(pipe), several["one"])


def test_get_adapters(pipe, several):
    assert pipe.get_active_adapters() == ["one", "two"]
    adapt(pipe, adapter="three")
    assert pipe.get_active_adapters() == ["three"]


def test_get_list_adapters(pipe, several):
    adapt(pipe, ["unet"], "three")
    assert pipe.get_list_adapters() == {"text_encoder": ["one", "two"], "unet": ["one", "two", "three"]}


# --- blocks of the UNet ----------------------------------------------------------------------------------------------


def test_simple_inference_with_text_denoiser_block_scale(pipe, base):
    adapt(pipe)
    tiles = []
    for weights in ({"text_encoder": 2, "unet": {"down": 5}}, {"unet": {"up": 5}}):
        pipe.set_adapters("default", weights)
        tiles.append(draw(pipe))
    assert_all_differ(base, *tiles)
    pipe.disable_lora()
    assert_same(draw(pipe), base)


def test_simple_inference_with_text_denoiser_multi_adapter_block_lora(pipe, base, several):
    one, two = {"text_encoder": 2, "unet": {"down": 5}}, {"unet": {"down": 5, "mid": 5}}
    tiles = []
    for names, weights in (("one", one), ("two", two), (["one", "two"], [one, two])):
        pipe.set_adapters(names, weights)
        tiles.append(draw(pipe))
    assert_all_differ(base, *tiles)
    with pytest.raises(ValueError, match="[Ll]ength of adapter names"):
        pipe.set_adapters(["one", "two"], [one])


def test_simple_inference_with_text_denoiser_block_scale_for_all_dict_options(pipe):
    """Every form that weights of blocks can have is taken, and reaches the layers of its block and no other."""
    adapt(pipe, ["unet"])
    downs = [2.0, {"block_0": 2.0}, {"block_0": [2.0] * pipe.unet.config.layers_per_block}, None]
    ups = [3.0, {"block_1": 3.0}, {"block_1": [3.0] * (pipe.unet.config.layers_per_block + 1)}, None]
    for down, mid, up in product(downs, [4.0, None], ups):
        given = {"down": down, "mid": mid, "up": up}
        pipe.set_adapters(
            "default", {"unet": {name: value for name, value in given.items() if value is not None} or 1.0}
        )
        for name, module in pipe.unet.named_modules():
            if hasattr(module, "scaling"):
                part = name.split("_block")[0]
                value = {"down": 2.0, "mid": 4.0, "up": 3.0}[part] if given[part] is not None else 1.0
                assert module.scaling["default"] == value


# --- this pipeline's own ---------------------------------------------------------------------------------------------


def test_failed_call_leaves_the_scale(pipe):
    """Oracle: a call's scale does not outlive it even when it fails half way."""
    adapt(pipe)
    full = draw(pipe)

    def fail(*_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        draw(pipe, 0.5, callback_on_step_end=fail)
    assert_same(draw(pipe), full)


def test_both_passes_use_the_lora(pipe):
    """Oracle: with the LoRA on the write pass alone switched off, the tile differs, so the write pass, too, runs with the LoRA."""
    adapt(pipe, ["unet"])
    full, calls = draw(pipe), []

    def write_without(module, args, kwargs):
        calls.append(1)
        scale = {"scale": 0.0} if len(calls) % 2 else None
        return args, {**kwargs, "cross_attention_kwargs": scale}

    hook = pipe.unet.register_forward_pre_hook(write_without, with_kwargs=True)
    partly = draw(pipe)
    hook.remove()
    assert_all_differ(partly, full)


def test_chain(pipe, tiny_chain, tmp_path):
    """Oracle: loaded into the chain, the LoRA changes its views as it does those of stage 1, and not with scale zero."""
    image = Image.new("RGB", (16, 16), "white")
    image.paste((200, 60, 40), (4, 4, 12, 12))

    def views(**kwargs) -> np.ndarray:
        out = tiny_chain(image, refine=False, generator=torch.Generator().manual_seed(0), **kwargs)
        return np.stack([np.asarray(view) for view in out.views[0]])

    before = views()
    save(adapt(pipe, ["unet"]), tmp_path / "lora")
    tiny_chain.load_lora_weights(tmp_path / "lora", adapter_name="one")
    after = views()
    assert not np.array_equal(after, before)
    assert np.array_equal(views(cross_attention_kwargs={"scale": 0.0}), before)
    assert tiny_chain.multiview.get_list_adapters() == tiny_chain.get_list_adapters() == {"unet": ["one"]}
    with pytest.raises(InputError, match="unload_lora_weights"):
        tiny_chain.save_pretrained(tmp_path / "chain")
    tiny_chain.fuse_lora()
    tiny_chain.unload_lora_weights()
    assert np.abs(views().astype(int) - after.astype(int)).max() <= 2
    tiny_chain.save_pretrained(tmp_path / "chain")
