"""Where the weights of stage 1 lie: what diffusers' `MemoryTesterMixin` and `LoraMemoryTesterMixin` check, under their names.

On a machine without a GPU the same hooks are put on with the CPU as their device, where diffusers allows that.
"""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from conftest import build_multiview
from diffusers.hooks import apply_group_offloading
from PIL import Image

from one2345pp import MultiViewTilePipeline


PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)) for i in range(2)]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
needs_gpu = pytest.mark.skipif(not GPU, reason="diffusers' offloading moves models to a GPU, and there is none")
GROUPS = {
    "block_level": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf_level": {"offload_type": "leaf_level"},
    "leaf_level, stream": {"offload_type": "leaf_level", "use_stream": True},
}
groups = pytest.mark.parametrize(
    "group", [pytest.param(name, marks=needs_gpu) if "stream" in name else name for name in GROUPS]
)


@pytest.fixture
def pipe() -> MultiViewTilePipeline:
    return build_multiview()


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return draw(build_multiview())


def draw(pipe) -> torch.Tensor:
    """Tiles of a batch, with guidance."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(PICTURES, generator=generators, output_type="pt", guidance_scale=2.0).images.cpu()


def assert_same(a, b, tolerance: float = 1e-3 if GPU else 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def modules(pipe) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def check_places(pipe, device: str, hook: type) -> None:
    """Every model has its weights on a device, and the hook that brings them when they are needed."""
    for name, model in modules(pipe).items():
        assert {parameter.device.type for parameter in model.parameters()} == {device}, name
        hooks = model._hf_hook.hooks if isinstance(model._hf_hook, SequentialHook) else [model._hf_hook]
        assert all(isinstance(one, hook) for one in hooks), name


# --- whole models and single layers ----------------------------------------------------------------------------------


def offload_models(pipe) -> None:
    """Bring each model when it is needed, and send it away when the next one is."""
    if GPU:
        pipe.enable_model_cpu_offload(device="cuda")
        return
    pipe.remove_all_hooks()  # what diffusers does, with the CPU as the device
    hook = None
    for name in pipe.model_cpu_offload_seq.split("->"):
        _, hook = cpu_offload_with_hook(modules(pipe)[name], DEVICE, prev_module_hook=hook)


def offload_layers(pipe) -> None:
    """Bring each layer's weights when it is needed."""
    if GPU:
        pipe.enable_sequential_cpu_offload(device="cuda")
        return
    pipe.remove_all_hooks()
    for model in modules(pipe).values():
        cpu_offload(model, DEVICE)


def test_model_cpu_offload_forward_pass(pipe, base):
    """Oracle: the tiles of the plain pipeline; afterwards every model is back."""
    offload_models(pipe)
    assert pipe._execution_device.type == DEVICE.type
    assert_same(draw(pipe), base)
    check_places(pipe, "cpu", CpuOffload)


def test_cpu_offload_forward_pass_twice(pipe, base):
    for _ in range(2):
        offload_models(pipe)
        assert_same(draw(pipe), base)
    check_places(pipe, "cpu", CpuOffload)


def test_model_cpu_offload_order(pipe):
    """Oracle: the models that a call runs come in the order in which diffusers expects to bring them, and none is left out."""
    order = pipe.model_cpu_offload_seq.split("->")
    assert set(order) == set(modules(pipe))
    calls = []
    for name in order:
        modules(pipe)[name].register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    pipe.vae.encoder.register_forward_pre_hook(lambda *_: calls.append("vae"))
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: calls.append("vae"))
    draw(pipe)
    first = list(dict.fromkeys(calls))
    # The VAE is needed twice, for the input before the UNet and for the tile after it: its place is that of the second.
    assert [name for name in first if name != "vae"] == [name for name in order if name != "vae"]
    assert calls[-1] == order[-1] == "vae"


def test_sequential_cpu_offload_forward_pass(pipe, base):
    """Oracle: the tiles of the plain pipeline; afterwards no weight is left loaded."""
    offload_layers(pipe)
    assert pipe._execution_device.type == DEVICE.type
    assert_same(draw(pipe), base)
    check_places(pipe, "meta", AlignDevicesHook)


def test_sequential_offload_forward_pass_twice(pipe, base):
    for _ in range(2):
        offload_layers(pipe)
        assert_same(draw(pipe), base)
    check_places(pipe, "meta", AlignDevicesHook)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_offload_without_gpu_is_refused(pipe):
    """diffusers says so itself."""
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            enable()


def test_pipeline_with_accelerator_device_map(pipe, base, tmp_path):
    """Oracle: loaded straight to the device, it draws the same tiles there."""
    pipe.save_pretrained(tmp_path)
    loaded = MultiViewTilePipeline.from_pretrained(tmp_path, device_map=DEVICE.type)
    loaded.set_progress_bar_config(disable=True)
    assert {model.device.type for model in modules(loaded).values()} == {DEVICE.type}
    assert_same(draw(loaded), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting_inference(pipe, base, dtype):
    """Weights of the UNet in 8 bits, computed in 16 or 32: near the tile, not equal to it."""
    pipe.to(DEVICE, dtype)
    plain = draw(pipe).float()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipe.unet.parameters()}
    tile = draw(pipe).float()
    assert tile.isfinite().all() and not torch.equal(tile, plain)
    assert (tile - base).abs().mean() < 0.02


# --- groups of layers ------------------------------------------------------------------------------------------------


def enable_groups(model, group: str) -> None:
    if hasattr(model, "enable_group_offload"):
        model.enable_group_offload(onload_device=DEVICE, offload_device=torch.device("cpu"), **GROUPS[group])
    else:
        apply_group_offloading(model, onload_device=DEVICE, offload_device=torch.device("cpu"), **GROUPS[group])


def grouped(model) -> bool:
    return any(
        getattr(m, "_diffusers_hook", None) and m._diffusers_hook.get_hook("group_offloading") for m in model.modules()
    )


@groups
def test_group_offloading_inference(pipe, base, group):
    """Oracle: the tiles of the plain pipeline."""
    for name in ("text_encoder", "unet"):
        enable_groups(modules(pipe)[name], group)
        assert grouped(modules(pipe)[name])
    for name in ("vae", "vision_encoder"):
        modules(pipe)[name].to(DEVICE)
    assert_same(draw(pipe), base)


def test_pipeline_level_group_offloading_sanity_checks(pipe, base):
    """Oracle: the model that is left out is where the tiles are drawn, without hooks; the others have theirs, and lie on the CPU."""
    pipe.enable_group_offload(
        onload_device=DEVICE,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        exclude_modules="text_encoder",
    )
    for name, model in modules(pipe).items():
        left_out = name == "text_encoder"
        assert grouped(model) != left_out
        assert next(model.parameters()).device.type == (DEVICE.type if left_out else "cpu")
    assert_same(draw(pipe), base)


def test_pipeline_level_group_offloading_inference(pipe, base):
    """Oracle: the tiles of the plain pipeline."""
    pipe.enable_group_offload(onload_device=DEVICE, offload_device=torch.device("cpu"), offload_type="leaf_level")
    assert all(grouped(model) for model in modules(pipe).values())
    assert_same(draw(pipe), base)


# --- with a LoRA -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path) -> tuple:
    """A folder with a LoRA of the UNet, and the tiles with it."""
    peft = pytest.importorskip("peft")
    pipe = build_multiview()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
        )
    MultiViewTilePipeline.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    return tmp_path, draw(pipe)


@groups
def test_group_offloading_inference_denoiser(pipe, base, lora, group):
    """Oracle: the tiles of the LoRA; unloaded, those without; loaded again, those of the LoRA."""
    folder, full = lora
    pipe.load_lora_weights(folder)
    enable_groups(pipe.unet, group)
    for name in ("vae", "vision_encoder", "text_encoder"):
        modules(pipe)[name].to(DEVICE)
    assert_same(draw(pipe), full)
    pipe.unload_lora_weights()
    assert grouped(pipe.unet)
    assert_same(draw(pipe), base)
    pipe.load_lora_weights(folder)
    assert grouped(pipe.unet)
    assert_same(draw(pipe), full)


def test_lora_group_offloading_delete_adapters(pipe, base, lora):
    folder, full = lora
    pipe.to(DEVICE)
    enable_groups(pipe.unet, "leaf_level")
    pipe.load_lora_weights(folder, adapter_name="default")
    assert_same(draw(pipe), full)
    pipe.delete_adapters("default")
    assert_same(draw(pipe), base)


@needs_gpu
def test_lora_loading_model_cpu_offload(pipe, lora):
    folder, full = lora
    pipe.enable_model_cpu_offload(device="cuda")
    pipe.load_lora_weights(folder)
    assert_same(draw(pipe), full)
