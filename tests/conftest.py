"""Fixtures that several test files use: tiny pipelines with random weights, example objects, a way to run the package anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]


def pytest_configure(config):
    """Processes that run tests side by side (`-n`) share the cores, and so do the processes that their tests start."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory):
    """Run Python code in a new process: `fresh_python(code, *args)` returns its stdout and fails on a non-zero exit."""
    modules = tmp_path_factory.mktemp("hf_modules")

    def run(code: str, *args) -> str:
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=modules, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def one_thread():
    """For small products: waiting for a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cuda():
    """A pretended one: the device."""
    from pretend_gpu import pretend_gpu

    with pretend_gpu("cuda") as device:
        yield device


@pytest.fixture(params=["cuda", "mps"])
def gpu(request):
    """A pretended one of either kind: the device."""
    from pretend_gpu import pretend_gpu

    with pretend_gpu(request.param) as device:
        yield device


def on(background, rgba):
    """A cut-out `[H, W, 4]` composited on a background (a colour, or pixels), as a picture."""
    import numpy as np
    from PIL import Image

    alpha = rgba[..., 3:] / 255
    return Image.fromarray(np.round(rgba[..., :3] * alpha + np.array(background) * (1 - alpha)).astype(np.uint8))


def alpha_error(cut, truth) -> float:
    """Mean difference of a picture's alpha and that of the truth, `[H, W, 4]`, 0 to 1."""
    import numpy as np

    return np.abs(np.asarray(cut)[..., 3].astype(float) - truth[..., 3]).mean() / 255


def image_encoder(hidden: int, projection: int):
    """A CLIP of 16 pixels whose vectors have `projection` numbers."""
    import transformers

    sizes = {"hidden_size": hidden, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=projection, **sizes)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def extractor(size: int, **kwargs):
    """Prepares pictures for an encoder of `size` pixels."""
    import transformers

    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    return transformers.CLIPImageProcessor(**sizes, **kwargs)


def multiview_components() -> dict:
    """Components of a stage 1 pipeline, real classes, as small as they get; views of 16 pixels.

    Widths differ wherever they may, here and in the volume stage, so that a mix-up of two fails.
    """
    import transformers
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    width, tokens = 12, 4
    vocabulary = {token: index for index, token in enumerate(["<|startoftext|>", "<|endoftext|>", "a", "a</w>"])}
    clip = {"hidden_size": width, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(
        vocab_size=4, max_position_embeddings=tokens, bos_token_id=0, eos_token_id=1, pad_token_id=1, **clip
    )
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tokens)
    return {
        "vae": AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        "text_encoder": transformers.CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 20),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        "scheduler": DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1),
        "vision_encoder": image_encoder(hidden=14, projection=width),
        "feature_extractor_clip": extractor(16),
        "feature_extractor_vae": extractor(16, image_mean=[0.5] * 3, image_std=[0.8] * 3),
    }


def build_multiview(components: dict | None = None, **settings):
    """A stage 1 pipeline of these components, by default those of `multiview_components`; quiet, two steps a call."""
    from one2345pp import MultiViewTilePipeline

    settings = {"view_size": 16, "default_num_inference_steps": 2} | settings
    pipe = MultiViewTilePipeline(**(components or multiview_components()), **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def tiny_multiview():
    """Stage 1 with random weights."""
    return build_multiview(ramping_coefficients=[0.1, 0.2, 0.3, 0.4])


def volume_components() -> dict:
    """Components of a stage 2 pipeline, real classes: 8 coarse cells, 16 fine ones. Random weights; the last biases
    make few cells occupied and those solid, so that there always is a mesh."""
    from diffusers import DDIMScheduler

    from one2345pp import ConditionEncoder, LogSNRScheduler, OccupancyUNet3DModel, SparseUNet3DModel

    torch.manual_seed(0)
    condition = {"image_size": 16, "stem_channels": (8,), "patch_channels": 0}
    occupancy, sparse = (4, 12), (12, 20)  # channels of the pyramids
    unet = {"global_channels": 18, "norm_num_groups": 4}
    components = {
        "occupancy_condition": ConditionEncoder(
            resolution=8, sparse=False, channels=occupancy, hidden_channels=5, **condition
        ),
        "occupancy_unet": OccupancyUNet3DModel(
            sample_size=8,
            block_out_channels=(8, 12),
            condition_channels=occupancy,
            attention_levels=(),
            dropout=0.0,
            **unet,
        ),
        "occupancy_scheduler": LogSNRScheduler(),
        "sparse_condition": ConditionEncoder(
            resolution=16, sparse=True, channels=sparse, hidden_channels=7, **condition
        ),
        "sparse_unet": SparseUNet3DModel(
            sample_size=16, pixel_channels=4, block_out_channels=(8, 16), condition_channels=sparse, **unet
        ),
        "sparse_scheduler": DDIMScheduler(
            beta_start=1e-4, beta_end=0.02, prediction_type="sample", timestep_spacing="trailing", clip_sample=True
        ),
    }
    with torch.no_grad():  # the last layers start at zero, which would make every object the same
        for layer in (components["occupancy_unet"].conv_out, components["sparse_unet"].proj_out):
            layer.weight.normal_(std=0.1)
        components["occupancy_unet"].conv_out.bias -= 1.0
        components["sparse_unet"].proj_out.bias[0] -= 1
    return components


def volume_encoder() -> dict:
    """The image encoder of `volume_components`, under the names of the volume stage."""
    torch.manual_seed(1)
    return {"vision_encoder": image_encoder(hidden=10, projection=18), "feature_extractor_clip": extractor(16)}


def tiny_dinov2():
    """A patch encoder of 8 channels with random weights, the same each time."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return Dinov2Model(Dinov2Config(**tiny)).eval()


@pytest.fixture(scope="session")
def tiny_chain_folder(tmp_path_factory):
    """The whole chain with random weights, saved. Its two image encoders differ in width."""
    from one2345pp import One2345PlusPlusPipeline

    folder = tmp_path_factory.mktemp("tiny_chain")
    texture = {"resolution": 8, "components": 2, "feature_channels": 4, "hidden": 8, "batch_size": 64}
    One2345PlusPlusPipeline(
        **multiview_components(),
        **volume_components(),
        **{f"volume_{name}": part for name, part in volume_encoder().items()},
        multiview_config={"view_size": 16, "default_num_inference_steps": 1, "default_guidance_scale": 2.0},
        volume_config={"default_num_occupancy_steps": 2, "default_num_sparse_steps": 2},
        texture_config=texture
        | {"default_num_inference_steps": 2, "default_texture_size": 64, "default_max_faces": 300},
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_chain(tiny_chain_folder):
    """The whole chain with random weights, loaded."""
    from one2345pp import One2345PlusPlusPipeline

    pipe = One2345PlusPlusPipeline.from_pretrained(tiny_chain_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
