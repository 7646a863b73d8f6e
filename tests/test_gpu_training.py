"""Training on a pretended GPU, every network: batches, noise and conditions come to it, and what is saved is on the CPU again."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import build_multiview, tiny_dinov2
from pretend_gpu import PretendTensor
from test_elevation import SMALL, sets  # noqa: F401
from test_multiview_pipeline import COMPONENTS
from test_training_finetune import STEPS
from test_training_finetune import config as finetuned
from test_training_multiview import CONFIG as FIRST
from test_training_multiview import data  # noqa: F401
from test_training_volume import CONFIG as VOLUMES
from test_training_volume import dataset, first_stage  # noqa: F401

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


def test_training_with_all_conditions(cuda, dataset, first_stage, tmp_path):  # noqa: F811
    """Drawn views told apart, the global vector, patch features and a predicted support."""
    tiny_dinov2().save_pretrained(tmp_path / "dino")
    for stage, module in (("occupancy", occupancy), ("sparse", sparse)):
        config = copy.deepcopy(VOLUMES[stage])
        config["unet"] |= {"global_channels": COMPONENTS["vision_encoder"]["projection_dim"]}
        config["condition"] |= {"view_kinds": True, "patch_channels": 8}
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


@pytest.mark.parametrize("change", [{}, {"lora_rank": 2}], ids=["attention", "lora"])
def test_fine_tuning(cuda, change, data, tmp_path):  # noqa: F811
    """Of a first stage with a text encoder."""
    base = tmp_path / "base"
    build_multiview(ramping_coefficients=[0.1, 0.2, 0.3, 0.4]).save_pretrained(base)

    def run(output, device, steps):
        phase = steps_of({**STEPS, "trainable": "attention", **change}, steps)
        multiview.run(finetuned(base, phases={"attention": phase}), data=data, output=output, device=device)

    assert_same_learning(run, tmp_path)


def test_training_of_the_first_stage(cuda, data, tmp_path):  # noqa: F811
    """Autoencoder, image encoder and UNet."""

    def run(output, device, steps):
        phases = {name: steps_of(phase, steps) for name, phase in FIRST["phases"].items()}
        multiview.run(FIRST | {"phases": phases}, data=data, output=output, device=device)

    assert_same_learning(run, tmp_path)


def test_training_of_the_elevation(cuda, sets, tmp_path):  # noqa: F811
    def run(output, device, steps):
        training = steps_of({"batch_size": 2, "max_steps": 2}, steps)
        config = {"estimator": SMALL, "objective": {"pictures": 4}, "training": training}
        rings = {"data": sets / "rings-train", "validation": sets / "rings-val"}
        elevation.run(config, **rings, output=output, device=device)

    assert_same_learning(run, tmp_path)
