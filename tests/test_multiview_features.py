"""What diffusers offers around a pipeline, on stage 1: it works, or it is refused. The table: docs/multiview.md; where weights
lie: test_multiview_memory."""

import numpy as np
import pytest
import torch
from conftest import build_multiview
from diffusers import TorchAoConfig
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.quantizers import PipelineQuantizationConfig
from PIL import Image

from one2345pp import (
    InputError,
    MultiViewTilePipeline,
    One2345PlusPlusPipeline,
    SparseVolumeDiffusionPipeline,
    TextureRefinementPipeline,
)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes needs a GPU, and there is none")


@pytest.fixture
def pipe():
    return build_multiview()


def draw(pipe) -> torch.Tensor:
    images = [PICTURE, PICTURE.rotate(90)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(images, generator=generators, output_type="pt", guidance_scale=2.0).images.cpu()


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return draw(build_multiview())


CHANGES_NOTHING = {
    "vae slicing": lambda pipe: pipe.vae.enable_slicing(),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "attention backend": lambda pipe: pipe.unet.set_attention_backend("native"),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("feature", CHANGES_NOTHING)
def test_changes_nothing(pipe, base, feature):
    """Oracle: the tiles of the plain pipeline, of a batch with guidance."""
    CHANGES_NOTHING[feature](pipe)
    torch.testing.assert_close(draw(pipe), base, atol=1e-4, rtol=1e-4)


def test_vae_tiling(pipe, base):
    """Oracle: tiles larger than the picture change nothing; smaller ones are used for the input and the output."""
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 32
    torch.testing.assert_close(draw(pipe), base, atol=1e-5, rtol=1e-5)
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4
    tiled = draw(pipe)
    assert tiled.shape == base.shape and tiled.isfinite().all() and not torch.equal(tiled, base)


def test_compiled_unet_is_compiled_once(pipe, base):
    """Oracle: the same tiles from one graph for each pass, whole, and none anew in the next call."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.unet.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(draw(pipe), base, atol=1e-4, rtol=1e-4)
    draw(pipe)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_fused_projections_are_refused(pipe, base):
    """With what to call; after that, all is as before."""
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        draw(pipe)
    pipe.unet.unfuse_qkv_projections()
    torch.testing.assert_close(draw(pipe), base, atol=1e-4, rtol=1e-4)


def test_from_pipe_shares_the_parts(pipe, tiny_chain, base):
    """Oracle: the same modules and settings; a stage can be made from a chain's stage with a changed setting."""
    again = MultiViewTilePipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.unet is pipe.unet and again.vae is pipe.vae and again.config.view_size == 16
    torch.testing.assert_close(draw(again), base)
    assert (
        MultiViewTilePipeline.from_pipe(tiny_chain.multiview, rig="zero123plus-v1.1").config.rig == "zero123plus-v1.1"
    )
    assert One2345PlusPlusPipeline.from_pipe(tiny_chain).occupancy_unet is tiny_chain.occupancy_unet


def test_from_pipe_takes_a_stage_out_of_a_chain(tiny_chain):
    """With the settings that the chain has for it, not the defaults of its class."""
    for cls, stage in (
        (MultiViewTilePipeline, tiny_chain.multiview),
        (SparseVolumeDiffusionPipeline, tiny_chain.volume),
        (TextureRefinementPipeline, tiny_chain.texture),
    ):
        taken = cls.from_pipe(tiny_chain)
        assert type(taken) is cls and taken.config == stage.config
        assert all(getattr(taken, name) is part for name, part in stage.components.items())


def test_diffusers_own_callback_ends_guidance(pipe):
    """Oracle: guidance in a share of the steps. The callback asks for the texts and leaves those of one branch."""

    def draw_one(**options):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            PICTURE, num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="latent", **options
        ).images

    cut = draw_one(callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
    torch.testing.assert_close(cut, draw_one(guidance_interval=(0.0, 0.5)))
    assert not torch.allclose(cut, draw_one(), atol=1e-3)


def test_quantised_unet(pipe, base, tmp_path):
    """Oracle: loaded with a quantisation config, the UNet's matrices are int8 and the tiles near those of the plain one."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is optional")
    config = PipelineQuantizationConfig(quant_mapping={"unet": TorchAoConfig(torchao.Int8WeightOnlyConfig())})
    pipe.save_pretrained(tmp_path)
    loaded = MultiViewTilePipeline.from_pretrained(tmp_path, quantization_config=config)
    loaded.set_progress_bar_config(disable=True)
    matrices = [module.weight for module in loaded.unet.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(matrix).__name__ for matrix in matrices} == {"Int8Tensor"}
    assert 0 < (draw(loaded) - base).abs().mean() < 0.01


@needs_gpu
def test_unet_quantised_by_bitsandbytes(pipe, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    pipe.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_8bit", quant_kwargs={"load_in_8bit": True}, components_to_quantize=["unet"]
    )
    loaded = MultiViewTilePipeline.from_pretrained(tmp_path, quantization_config=config).to("cuda")
    assert (draw(loaded) - base).abs().mean() < 0.1
