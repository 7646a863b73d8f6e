"""Training on a pretended GPU, every network: batches, noise and conditions come to it, and what is saved is on the CPU again."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from conftest import build_multiview, tiny_dinov2
from pretend_gpu import PretendTensor
from test_elevation import SMALL, sets  # noqa: F401
from test_training_finetune import STEPS
from test_training_finetune import config as finetuned
from test_training_multiview import CONFIG as FIRST
from test_training_multiview import data  # noqa: F401
from test_training_volume import CONFIG as VOLUMES
from test_training_volume import dataset, first_stage  # noqa: F401
from training_config import COMPONENTS

from one2345pp.training import (
    drawn_views,
    elevation,
    finetune,
    loop,
    multiview,
    multiview_data,
    occupancy,
    sparse,
    volume_objective,
)


pytestmark = pytest.mark.usefixtures("one_thread")


class PretendAccelerator(Accelerator):
    """One that believes that there is a GPU, but for runs on the CPU."""

    def __init__(self, cpu: bool, **kwargs):
        super().__init__(cpu=cpu, **kwargs)
        self.on_cpu = cpu

    device = property(lambda self: torch.device("cpu") if self.on_cpu else PretendTensor.gpu)

    def prepare(self, *parts):
        return parts


class PretendState:
    """A `PartialState` that believes so, too."""

    def __init__(self, cpu: bool):
        self.real = PartialState(cpu=cpu)
        self.device = torch.device("cpu") if cpu else PretendTensor.gpu

    def __getattr__(self, name: str):
        return getattr(self.real, name)


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    monkeypatch.setattr(loop, "Accelerator", PretendAccelerator)
    for module in (multiview, finetune, volume_objective):
        monkeypatch.setattr(module, "PartialState", PretendState)


@pytest.fixture
def places(monkeypatch) -> list[str]:
    """Where the first stage was whenever it began to encode what it learns from, or to draw what the other networks learn from."""
    seen, encode, draw = [], multiview_data.LatentDataset._encode, drawn_views.DrawnViewsDataset._draw

    def watched_encode(prepared, pipeline, *args):
        assert pipeline.vae.device == pipeline.vision_encoder.device
        seen.append(pipeline.vae.device.type)
        encode(prepared, pipeline, *args)

    def watched_draw(self, pipeline, *args):
        seen.append(pipeline.device.type)
        draw(self, pipeline, *args)

    monkeypatch.setattr(multiview_data.LatentDataset, "_encode", staticmethod(watched_encode))
    monkeypatch.setattr(drawn_views.DrawnViewsDataset, "_draw", watched_draw)
    return seen


def assert_same_learning(run, folder, device: str = "cuda") -> None:
    """`run(output, device, steps)` moves the weights to where the CPU moves them: off by less than a twentieth of the way, and on the
    CPU when they are saved."""
    for name, where, steps in (("before", "cpu", 0), ("here", "cpu", None), ("there", device, None)):
        run(folder / name, where, steps)
    files = sorted(file.relative_to(folder / "here") for file in (folder / "here").rglob("state.pt"))
    assert files
    for file in files:
        before, here, there = (
            torch.load(folder / name / file, weights_only=True)["modules"] for name in ("before", "here", "there")
        )
        assert all(type(weight) is torch.Tensor for weight in there.values())
        way, off = (sum((a[k] - here[k]).abs().sum().item() for k in here) for a in (before, there))
        assert off < 0.05 * way, (file, off, way)


def steps_of(training: dict, steps: int | None) -> dict:
    return training | {"compile": None, "warmup_steps": 1} | ({} if steps is None else {"max_steps": steps})


@pytest.mark.parametrize("stage", ["occupancy", "sparse"])
def test_training_of_volumes(gpu, stage, dataset, tmp_path):  # noqa: F811
    """Two steps, figures and a preview, and two more from the saved state."""
    module, config = {"occupancy": occupancy, "sparse": sparse}[stage], VOLUMES[stage]

    def run(output, device, steps):
        for most in (2, 4) if steps is None else (steps,):
            training = steps_of(config["training"], most)
            arguments = {"data": dataset.path, "output": output, "validation": dataset.path}
            module.run({**config, "training": training}, **arguments, device=device)

    assert_same_learning(run, tmp_path, gpu.type)
    assert list((tmp_path / "there").glob("preview-*.png"))


def test_training_with_all_conditions(cuda, places, dataset, first_stage, tmp_path):  # noqa: F811
    """Drawn views, the global vector, patch features and a predicted support. The views are drawn on the GPU."""
    tiny_dinov2().save_pretrained(tmp_path / "dino")
    for stage, module in (("occupancy", occupancy), ("sparse", sparse)):
        config = copy.deepcopy(VOLUMES[stage])
        config["unet"] |= {"global_channels": COMPONENTS["vision_encoder"]["projection_dim"]}
        config["condition"] |= {"patch_channels": 8}
        config["objective"] = {"multiview": str(first_stage), "drawn_samples": 2, "drawn_steps": 1}
        config["objective"] |= {"patch_encoder": str(tmp_path / "dino")}
        if stage == "sparse":
            config["objective"] |= {"predicted_support": 1.0, "occupancy": str(tmp_path / "occupancy" / "here")}
        config["views"] = {"drawn": 0.5}

        def run(output, device, steps, module=module, config=config):
            training = steps_of(config["training"] | {"max_steps": 2}, steps)
            arguments = {"data": dataset.path, "output": output, "validation": dataset.path}
            module.run({**config, "training": training}, **arguments, device=device)

        assert_same_learning(run, tmp_path / stage)
    assert places == 2 * (4 * ["cpu"] + 2 * ["cuda"])  # for training and validation, of each of three runs


@pytest.mark.parametrize("change", [{}, {"lora_rank": 2}], ids=["attention", "lora"])
def test_fine_tuning(cuda, places, change, data, tmp_path):  # noqa: F811
    """Of a first stage with a text encoder. Latents are encoded on the GPU."""
    base = tmp_path / "base"
    build_multiview(ramping_coefficients=[0.1, 0.2, 0.3, 0.4]).save_pretrained(base)

    def run(output, device, steps):
        phase = steps_of({**STEPS, "trainable": "attention", **change}, steps)
        multiview.run(finetuned(base, phases={"attention": phase}), data=data, output=output, device=device)

    assert_same_learning(run, tmp_path)
    assert places == ["cpu", "cpu", "cuda"]


def test_training_of_the_first_stage(cuda, places, data, tmp_path):  # noqa: F811
    """Autoencoder, image encoder and UNet, whose latents are encoded on the GPU."""

    def run(output, device, steps):
        phases = {name: steps_of(phase, steps) for name, phase in FIRST["phases"].items()}
        multiview.run(FIRST | {"phases": phases}, data=data, output=output, device=device)

    assert_same_learning(run, tmp_path)
    assert places == ["cpu", "cpu", "cuda"]


def test_latents_of_a_gpu(cuda, data, tmp_path):  # noqa: F811
    """Oracle: those of the CPU, from the same draws; afterwards both encoders are on the CPU again."""
    pipe, arrays = build_multiview(), []
    for device in ("cpu", cuda):
        arrays.append(
            multiview_data.LatentDataset(data, pipe, tmp_path / str(device), device, recolored_copies=1).arrays
        )
        weights = [*pipe.vae.parameters(), *pipe.vision_encoder.parameters()]
        assert all(weight.device.type == "cpu" for weight in weights)
    for name, array in arrays[0].items():
        np.testing.assert_allclose(arrays[1][name], array, atol=2e-3, rtol=2e-3)


def test_training_of_the_elevation(cuda, sets, tmp_path):  # noqa: F811
    def run(output, device, steps):
        training = steps_of({"batch_size": 2, "max_steps": 2}, steps)
        config = {"estimator": SMALL, "objective": {"pictures": 4}, "training": training}
        rings = {"data": sets / "rings-train", "validation": sets / "rings-val"}
        elevation.run(config, **rings, output=output, device=device)

    assert_same_learning(run, tmp_path)
