"""The stage 1 pipeline against what the published Zero123++ algorithm computes. The pipeline's habits are tested elsewhere."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import vae as diffusers_vae
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from PIL import Image

from one2345pp.pipelines import pipeline_multiview_tile
from one2345pp.pipelines.pipeline_multiview_tile import MultiViewTilePipeline


VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "zero123plus"
pytestmark = pytest.mark.skipif(not VECTORS.exists(), reason=f"the test vectors are not at {VECTORS}")
CASES = ["rgba_cfg4_ddim", "rgb_cfg1_ddim", "rgba_cfg4_eulera", "rgba_cfg4_ddim_controlnet"]


@pytest.fixture
def no_noise(monkeypatch):
    """Every random draw is zero, as it was when the vectors were made."""

    def zeros(shape, generator=None, device=None, dtype=None, layout=None):
        return torch.zeros(shape, device=device, dtype=dtype)

    for module in (pipeline_multiview_tile, diffusers_vae, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", zeros)


@pytest.mark.parametrize("name", CASES)
def test_pipeline_computes_what_zero123plus_computes(name, no_noise):
    """Oracle: vectors of the published algorithm on a checkpoint with random weights, so that any slip in a scale, a branch,
    a noise level or the order of reference tokens shows; the folder is loaded as it stands."""
    case = json.loads((VECTORS / "cases.json").read_text())[name]
    expected = np.load(VECTORS / f"{name}.npz")
    pipe = MultiViewTilePipeline.from_pretrained(VECTORS / "checkpoint")
    pipe.scheduler = getattr(diffusers, case["scheduler"]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    call = {key: case[key] for key in ("num_inference_steps", "guidance_scale", "width", "height")}
    call["latents"] = torch.from_numpy(np.load(VECTORS / "latents.npy"))
    image = Image.open(VECTORS / case["input"])
    if case["controlnet"]:
        folder, control, call["controlnet_conditioning_scale"] = case["controlnet"]
        pipe.register_modules(controlnet=diffusers.ControlNetModel.from_pretrained(VECTORS / folder))
        call["control_image"] = Image.open(VECTORS / control)

    np.testing.assert_allclose(pipe(image, **call, output_type="latent").images, expected["latent"], atol=5e-4)
    np.testing.assert_allclose(pipe(image, **call, output_type="np").images, expected["np"], atol=1e-3)
