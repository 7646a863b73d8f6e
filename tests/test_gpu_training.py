"""Training on a pretended GPU, every network: batches, noise and conditions come to it, and what is saved is on the CPU again."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import build_multiview
from pretend_gpu import PretendTensor
from test_elevation import SMALL, sets  # noqa: F401
from test_multiview_pipeline import COMPONENTS
from test_training_finetune import STEPS, tile
from test_training_finetune import config as finetuned
from test_training_multiview import CONFIG as FIRST
from test_training_multiview import data  # noqa: F401
from test_training_volume import CONFIG as VOLUMES
from test_training_volume import dataset, first_stage  # noqa: F401
from transformers import Dinov2Config, Dinov2Model

from one2345pp import MultiViewTilePipeline
from one2345pp.training import elevation, loop, multiview, occupancy, sparse


pytestmark = pytest.mark.usefixtures("one_thread")


class PretendAccelerator(Accelerator):
    """One that believes that there is a GPU, but for runs on the CPU."""

    def __init__(self, cpu: bool, **kwargs):
        super().__init__(cpu=cpu, **kwargs)
        self.on_cpu = cpu

    device = property(lambda self: torch.device("cpu") if self.on_cpu else PretendTensor.gpu)

    def prepare(self, *parts):
        return parts


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    monkeypatch.setattr(loop, "Accelerator", PretendAccelerator)


def assert_same_weights(there, here) -> None:
    """Of two runs; what was saved is on the CPU."""
    states = [torch.load(folder / "state.pt", weights_only=True)["modules"] for folder in (there, here)]
    for name, weight in states[0].items():
        assert type(weight) is torch.Tensor
        torch.testing.assert_close(weight, states[1][name], atol=1e-3, rtol=1e-3, msg=name)


def assert_same_tile(there, here) -> None:
    tiles = [tile(MultiViewTilePipeline.from_pretrained(folder)) for folder in (there, here)]
    torch.testing.assert_close(*tiles, atol=1e-2, rtol=0)


@pytest.mark.parametrize("stage", ["occupancy", "sparse"])
def test_training_of_volumes(gpu, stage, dataset, tmp_path):  # noqa: F811
    """Oracle: the weights of a run on the CPU. Two steps, figures and a preview, and two more from the saved state."""
    module, config = {"occupancy": occupancy, "sparse": sparse}[stage], VOLUMES[stage]
    for device in ("cpu", gpu.type):
        for steps in (2, 4):
            training = config["training"] | {"max_steps": steps, "compile": None}
            arguments = {"data": dataset.path, "output": tmp_path / device, "validation": dataset.path}
            module.run({**config, "training": training}, **arguments, device=device)
    assert_same_weights(tmp_path / gpu.type, tmp_path / "cpu")
    assert list((tmp_path / gpu.type).glob("preview-*.png"))


def test_training_with_all_conditions(cuda, dataset, first_stage, tmp_path):  # noqa: F811
    """Oracle: the weights of a run on the CPU. Drawn views told apart, the global vector, patch features and a predicted support."""
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path / "dino")
    for stage, module in (("occupancy", occupancy), ("sparse", sparse)):
        config = copy.deepcopy(VOLUMES[stage])
        config["training"] |= {"max_steps": 1, "compile": None}
        config["unet"] |= {"global_channels": COMPONENTS["vision_encoder"]["projection_dim"]}
        config["condition"] |= {"view_kinds": True, "patch_channels": 8}
        config["objective"] = {"multiview": str(first_stage), "drawn_samples": 2, "drawn_steps": 1}
        config["objective"] |= {"patch_encoder": str(tmp_path / "dino")}
        if stage == "sparse":
            config["objective"] |= {"predicted_support": 1.0, "occupancy": str(tmp_path / "cpu" / "occupancy")}
        config["views"] = {"drawn": 0.5}
        for device in ("cpu", "cuda"):
            arguments = {"data": dataset.path, "output": tmp_path / device / stage, "validation": dataset.path}
            module.run(config, **arguments, device=device)
        assert_same_weights(tmp_path / "cuda" / stage, tmp_path / "cpu" / stage)


@pytest.mark.parametrize("change", [{}, {"lora_rank": 2}], ids=["attention", "lora"])
def test_fine_tuning(cuda, change, data, tmp_path):  # noqa: F811
    """Oracle: the tile of a run on the CPU. The first stage has a text encoder."""
    base = tmp_path / "base"
    build_multiview(ramping_coefficients=[0.1, 0.2, 0.3, 0.4]).save_pretrained(base)
    config = finetuned(base, phases={"attention": {**STEPS, "trainable": "attention", "compile": None, **change}})
    for device in ("cpu", "cuda"):
        multiview.run(config, data=data, output=tmp_path / device, device=device)
    assert_same_tile(tmp_path / "cuda" / "pipeline", tmp_path / "cpu" / "pipeline")


def test_training_of_the_first_stage(cuda, data, tmp_path):  # noqa: F811
    """Oracle: the tile of a run on the CPU, after autoencoder, image encoder and UNet."""
    phases = {name: phase | {"compile": None} for name, phase in FIRST["phases"].items()}
    for device in ("cpu", "cuda"):
        multiview.run(FIRST | {"phases": phases}, data=data, output=tmp_path / device, device=device)
    assert_same_tile(tmp_path / "cuda" / "pipeline", tmp_path / "cpu" / "pipeline")


def test_training_of_the_elevation(cuda, sets, tmp_path):  # noqa: F811
    """Oracle: the weights of a run on the CPU."""
    training = {"batch_size": 2, "max_steps": 2, "compile": None}
    config = {"estimator": SMALL, "objective": {"pictures": 4}, "training": training}
    for device in ("cpu", "cuda"):
        rings = {"data": sets / "rings-train", "validation": sets / "rings-val"}
        elevation.run(config, **rings, output=tmp_path / device, device=device)
    assert_same_weights(tmp_path / "cuda", tmp_path / "cpu")
