"""What diffusers' `PipelineTesterMixin` checks, on stage 1 and under its names; most say more than a shape. Its LoRA mixins:
test_multiview_lora; its memory mixins: test_multiview_memory."""

import inspect

import numpy as np
import pytest
import torch
from conftest import build_multiview, multiview_components
from PIL import Image

from one2345pp import InputError, MultiViewTilePipeline
from one2345pp.models.attention_reference import ReferenceAttention


PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)) for i in range(2)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="is about a GPU, and there is none")


@pytest.fixture(scope="module")
def components() -> dict:
    return multiview_components()


@pytest.fixture
def pipe() -> MultiViewTilePipeline:
    return build_multiview()


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return draw(build_multiview())


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def draw(pipe, image=PICTURES[0], **kwargs) -> torch.Tensor:
    settings = {"prompt": "a", "guidance_scale": 2.0, "generator": seed(), "output_type": "pt"} | kwargs
    return pipe(image, **settings).images


def assert_same(a, b, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def differs(a, b) -> bool:
    return not torch.allclose(a, b, atol=1e-3, rtol=1e-3)


# --- the call --------------------------------------------------------------------------------------------------------


def test_output(base):
    """Tiles of three rows and two columns, in [0, 1], and not of one colour."""
    assert base.shape == (1, 3, 48, 32) and base.min() >= 0 and base.max() <= 1 and base.std() > 0.01


def test_pipeline_call_signature():
    """Oracle: diffusers' names of what its pipelines take; only the image has to be given."""
    parameters = inspect.signature(MultiViewTilePipeline.__call__).parameters
    expected = """image prompt negative_prompt height width num_inference_steps guidance_scale num_images_per_prompt control_image
        controlnet_conditioning_scale control_guidance_start control_guidance_end cross_attention_kwargs generator latents
        prompt_embeds negative_prompt_embeds output_type callback_on_step_end callback_on_step_end_tensor_inputs return_dict"""
    assert set(expected.split()) <= set(parameters)
    assert [name for name, one in parameters.items() if one.default is one.empty] == ["self", "image"]


def test_dict_tuple_outputs_equivalent(pipe):
    as_dict = pipe(PICTURES[0], generator=seed(), output_type="pt")
    as_tuple = pipe(PICTURES[0], generator=seed(), output_type="pt", return_dict=False)
    assert torch.equal(as_dict.images, as_tuple[0]) and torch.equal(as_dict.views, as_tuple[1])


def test_inference_batch_consistent(pipe):
    """As many tiles as pictures, with texts of any length, and no two the same."""
    tiles = draw(pipe, PICTURES * 2, prompt=["", "a", "aa", 100 * "a "], generator=[seed(i) for i in range(4)])
    assert tiles.shape == (4, 3, 48, 32) and tiles.unique(dim=0).shape == tiles.shape


def test_inference_batch_single_identical(pipe):
    """Oracle: with a generator a tile, each image of a batch gets the tile that it gets alone."""
    batch = draw(pipe, PICTURES, generator=[seed(1), seed(2)])
    for index in range(2):
        assert_same(batch[index : index + 1], draw(pipe, PICTURES[index], generator=[seed(1 + index)]))


def test_num_images_per_prompt(pipe):
    """Oracle: tiles of one image stand together, each as its own generator alone would draw it."""
    tiles = draw(pipe, PICTURES, num_images_per_prompt=2, generator=[seed(i) for i in range(4)])
    assert len(tiles) == 4 and not torch.allclose(tiles[0], tiles[1])
    assert_same(tiles[2:3], draw(pipe, PICTURES[1], generator=seed(2)))


def test_cfg(pipe):
    """Oracle: the formula, negative + scale (positive - negative), on what the UNet says of both branches."""
    read, said = ReferenceAttention.read, []

    def listen(*args, **kwargs) -> torch.Tensor:
        said.append(read(*args, **kwargs))
        return said[-1]

    guided, predict = [], pipe.predict
    pipe.predict = lambda *args, **kwargs: guided.append(predict(*args, **kwargs)) or guided[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceAttention, "read", listen)
        for scale in (1.0, 2.0, 3.5):
            draw(pipe, guidance_scale=scale, num_inference_steps=1)
    assert [len(prediction) for prediction in said] == [1, 2, 2]
    assert torch.equal(guided[0], said[0]) and differs(guided[1], guided[2])
    for scale, prediction, result in ((2.0, said[1], guided[1]), (3.5, said[2], guided[2])):
        negative, positive = prediction.chunk(2)
        assert_same(result, negative + scale * (positive - negative), 1e-5)


def test_callback_inputs(pipe):
    """Oracle: a callback gets what it asks for, and what it returns is used; latents of zero leave as the offset of Zero123++'s
    scale, where other pipelines give zero."""
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return tensors

    def zero(pipe, step, timestep, tensors):
        last = step == pipe.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else {}

    plain = draw(pipe, output_type="latent")
    assert torch.equal(plain, draw(pipe, output_type="latent", callback_on_step_end=look))
    shapes = {"latents": (1, 4, 24, 16), "prompt_embeds": (2, 4, 12), "reference_latents": (2, 4, 8, 8)}
    assert seen == [(step, {"latents": shapes["latents"]}) for step in range(2)]
    seen.clear()
    names = pipe._callback_tensor_inputs
    draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert seen == [(step, shapes) for step in range(2)] and list(shapes) == names
    out = draw(pipe, output_type="latent", callback_on_step_end=zero)
    assert torch.allclose(out, torch.full_like(out, 0.22))


def test_callback_cfg(pipe):
    """Oracle: a guidance scale that a callback raises from a step on is that of the following steps."""
    scales, predict = [], pipe.predict

    def increase(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return {}

    pipe.predict = lambda *args, **kwargs: scales.append(pipe.guidance_scale) or predict(*args, **kwargs)
    raised = draw(pipe, num_inference_steps=3, callback_on_step_end=increase)
    assert scales == [2.0, 3.0, 4.0] and pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert differs(raised, draw(pipe, num_inference_steps=3))


# --- text alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [{}, {"negative_prompt": "aa"}, {"guidance_scale": 1.0}])
def test_encode_prompt_works_in_isolation(components, texts):
    """Oracle: what a pipeline of the text encoder alone makes of the texts gives, in one without it, the tiles of the whole."""
    text = {"text_encoder", "tokenizer"}
    encoder = build_multiview({name: part if name in text else None for name, part in components.items()})
    rest = build_multiview({name: None if name in text else part for name, part in components.items()})
    prompts = ["a", "a a"]
    positive, negative = encoder.encode_prompt(prompts, texts.get("negative_prompt"))
    assert positive.shape == negative.shape == (2, 4, 12) and differs(positive[0], positive[1])

    def pair(pipe, **kwargs) -> torch.Tensor:
        return draw(pipe, PICTURES, generator=[seed(1), seed(2)], **texts | kwargs)

    whole = pair(build_multiview(components), prompt=prompts)
    assert differs(whole, pair(build_multiview(components), prompt=""))
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert_same(pair(rest, prompt=None, negative_prompt=None, **embeds), whole)


def test_texts_may_be_a_tuple(pipe):
    generators = [[seed(1), seed(2)] for _ in range(2)]
    as_list, as_tuple = (
        draw(pipe, PICTURES, prompt=kind(["a", "aa"]), generator=generators.pop()) for kind in (list, tuple)
    )
    assert torch.equal(as_list, as_tuple)


def test_one_side_may_be_text(pipe):
    """Oracle: embeds of one branch beside the text of the other."""
    whole = draw(pipe, negative_prompt="aa")
    positive, negative = pipe.encode_prompt("a", "aa")
    assert_same(draw(pipe, prompt=None, prompt_embeds=positive, negative_prompt="aa"), whole)
    assert_same(draw(pipe, negative_prompt_embeds=negative), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 4, 12)}, "got both"),
        ({"prompt": "", "prompt_embeds": torch.zeros(2, 4, 12)}, "one an image"),
        ({"prompt": "", "prompt_embeds": torch.zeros(1, 4, 9)}, "cross_attention_dim"),
        ({"prompt": "", "prompt_embeds": torch.zeros(4, 12)}, "expected 1"),
        ({"prompt": "", "prompt_embeds": torch.zeros(1, 3, 12)}, r"got \[3, 4\] tokens"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 4, 12)}, "negative_prompt, "),
    ],
)
def test_unusable_embeds_are_refused(pipe, arguments, message):
    with pytest.raises(InputError, match=message):
        draw(pipe, **arguments)


def test_text_without_encoder_is_refused(components):
    pipe = build_multiview(components | {"text_encoder": None, "tokenizer": None})
    with pytest.raises(InputError, match="prompt_embeds"):
        draw(pipe)


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_save_load_local(pipe, base, tmp_path, safe_serialization):
    """Also saved after a call: every component is still its own class."""
    assert_same(draw(pipe), base)
    pipe.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = load(tmp_path)
    assert {name: type(part) for name, part in loaded.components.items()} == {
        name: type(part) for name, part in pipe.components.items()
    }
    assert loaded.config.view_size == 16
    assert_same(draw(loaded), base, 1e-5)


def test_save_load_optional_components(pipe, base, tmp_path):
    """The optional component, a ControlNet, stays away."""
    assert pipe._optional_components == ["controlnet"] and pipe.controlnet is None
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.controlnet is None and not (tmp_path / "controlnet").exists()
    assert_same(draw(loaded), base, 1e-5)


def test_components_function(pipe, components, base):
    """Oracle: the components are those that were given, and rebuild the pipeline."""
    assert set(pipe.components) == {*components, "controlnet"}
    again = build_multiview(pipe.components)
    assert all(again.components[name] is part for name, part in pipe.components.items())
    assert_same(draw(again), base, 1e-6)


def test_serialization_with_variants(pipe, tmp_path):
    """Every file of weights has the variant in its name."""
    pipe.save_pretrained(tmp_path, variant="fp16")
    weights = {path.parent.name: path.name for path in tmp_path.rglob("*.safetensors")}
    assert set(weights) == {"vae", "text_encoder", "unet", "vision_encoder"}
    assert all(".fp16." in name for name in weights.values())


def test_loading_with_variants(pipe, tmp_path):
    """Oracle: the same weights, to the last bit."""
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = load(tmp_path, variant="fp16")
    for name in ("vae", "text_encoder", "unet", "vision_encoder"):
        weights, again = pipe.components[name].state_dict(), loaded.components[name].state_dict()
        assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)


def test_loading_with_incorrect_variants_raises_error(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant=fp16"):
        MultiViewTilePipeline.from_pretrained(tmp_path, variant="fp16")


def load(folder, **kwargs) -> MultiViewTilePipeline:
    pipe = MultiViewTilePipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- number formats and devices --------------------------------------------------------------------------------------


def dtypes(pipe) -> dict[str, torch.dtype]:
    return {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def test_to_dtype(pipe):
    assert set(dtypes(pipe).values()) == {torch.float32}
    assert set(dtypes(pipe.to(dtype=torch.float16)).values()) == {torch.float16}


def test_torch_dtype_dict(pipe, base, tmp_path):
    """Oracle: the component that is named has its own format, the others the default; together they draw nearly the tile in whole
    precision."""
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, torch_dtype={"unet": torch.float32, "default": torch.bfloat16})
    found = dtypes(loaded)
    assert found.pop("unet") == torch.float32 and set(found.values()) == {torch.bfloat16}
    assert (draw(loaded).float() - base).abs().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inference_no_nan(pipe, base, dtype):
    """Oracle: near the tile in whole precision."""
    tile = draw(pipe.to(dtype)).float()
    assert tile.isfinite().all() and (tile - base).abs().mean() < 0.02


def test_save_load_float16(pipe, tmp_path):
    """Oracle: saved in half precision and loaded as such, the tile is the same."""
    tile = draw(pipe.to(torch.float16))
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, torch_dtype=torch.float16)
    assert set(dtypes(loaded).values()) == {torch.float16}
    assert_same(draw(loaded), tile, 1e-2)


def test_to_device_moves_every_part(pipe):
    pipe.to("meta")
    assert {part.device.type for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {"meta"}


@needs_gpu
def test_to_device(pipe, base):
    """Oracle: the tile that the CPU draws, from parts that are all on the GPU, and after going back."""
    pipe.to("cuda")
    assert {part.device.type for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {"cuda"}
    assert_same(draw(pipe).cpu(), base, 1e-2)
    assert_same(draw(pipe.to("cpu")), base, 1e-4)
