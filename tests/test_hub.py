"""Saved folders: any diffusers program loads them, our classes load them without running their code, nothing private leaks."""

import json
import shutil

import pytest
import torch
from conftest import build_multiview
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image

from one2345pp import InputError, MultiViewTilePipeline
from one2345pp.pipelines import hub


PICTURE = Image.new("RGBA", (16, 16), (200, 60, 40, 255))

# What another program does: it knows diffusers and folders, not this package. For every task (folder, arguments, where to save again)
# it prints the classes, the dtype and the sum of the pixels that the pipeline draws.
PROGRAM = """
import json, sys, torch, diffusers
from diffusers import DiffusionPipeline
from PIL import Image
results = []
for folder, kwargs, save_to in json.loads(sys.argv[1]):
    if "scheduler" in kwargs:
        kwargs["scheduler"] = getattr(diffusers, kwargs["scheduler"]).from_pretrained(folder, subfolder="scheduler")
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    if save_to:
        pipe.save_pretrained(save_to)
    picture = Image.new("RGBA", (16, 16), (200, 60, 40, 255))
    images = pipe(picture, generator=torch.Generator().manual_seed(0), output_type="np").images
    classes = [type(pipe).__name__, type(pipe).__module__, type(pipe.scheduler).__name__]
    results.append([*classes, str(pipe.unet.dtype), float(images.sum())])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved stage 1 and the pixel sum it draws."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = build_multiview()
    pipe.save_pretrained(folder)
    return folder, _draw(pipe)


def _draw(pipe) -> float:
    pipe.set_progress_bar_config(disable=True)
    return float(pipe(PICTURE, generator=torch.Generator().manual_seed(0), output_type="np").images.sum())


def _index(folder) -> dict:
    return json.loads((folder / "model_index.json").read_text())


def test_model_index_is_what_other_machines_can_read(saved):
    """The class is named with its file, processors by the name that every transformers has, and no local path is told."""
    folder, _ = saved
    MultiViewTilePipeline.from_pretrained(folder).save_pretrained(folder / "again")
    for index in (_index(folder), _index(folder / "again")):
        assert index["_class_name"] == ["pipeline", "MultiViewTilePipeline"]
        assert index["feature_extractor_clip"] == ["transformers", "CLIPImageProcessor"]
        assert "_name_or_path" not in index
        assert str(folder) not in json.dumps(index)
    shutil.rmtree(folder / "again")


@pytest.mark.slow
def test_diffusers_programs_load_and_save(saved, fresh_python, tmp_path):
    """Programs that never imported the package get the installed class and the same picture: as the folder stands, with another
    scheduler, saved again from there, by `custom_pipeline`, and as a half precision variant."""
    folder, expected = str(saved[0]), saved[1]
    again, half = str(tmp_path / "again"), str(tmp_path / "half")
    MultiViewTilePipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(half, variant="fp16")
    tasks = [[folder, {"scheduler": "EulerDiscreteScheduler"}, again], [folder, {}, None]]
    swapped, plain = json.loads(fresh_python(PROGRAM, json.dumps(tasks)))
    tasks = [[again, {}, None], [folder, {"custom_pipeline": "pipeline"}, None], [half, {"variant": "fp16"}, None]]
    reloaded, named, variant = json.loads(fresh_python(PROGRAM, json.dumps(tasks)))

    for result in (swapped, plain, reloaded, named, variant):
        assert result[:2] == ["MultiViewTilePipeline", MultiViewTilePipeline.__module__]
        assert result[3] == "torch.float32"
    assert plain[4] == pytest.approx(expected, rel=1e-5)
    assert named[4] == pytest.approx(expected, rel=1e-5)
    assert variant[4] == pytest.approx(expected, rel=1e-2)
    assert swapped[2] == reloaded[2] == "EulerDiscreteScheduler"
    assert swapped[4] == pytest.approx(reloaded[4], rel=1e-5)


def test_half_precision_weights_load_as_float32(saved, tmp_path):
    """Weights on disk may be half; without `dtype` every model is float32, in our class and in any program, where transformers'
    models alone would stay half and the call would fail; with `dtype` they are what was asked for."""
    half = MultiViewTilePipeline.from_pretrained(saved[0], dtype=torch.float16)
    half.save_pretrained(tmp_path / "plain")
    half.save_pretrained(tmp_path / "variant", variant="fp16")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    assert {model.dtype for model in theirs.components.values() if isinstance(model, torch.nn.Module)} == {
        torch.float32
    }
    cases = [
        ("plain", {}, torch.float32),
        ("variant", {"variant": "fp16"}, torch.float32),
        ("plain", {"dtype": torch.bfloat16}, torch.bfloat16),
    ]
    for folder, kwargs, dtype in cases:
        pipe = MultiViewTilePipeline.from_pretrained(tmp_path / folder, **kwargs)
        assert {model.dtype for model in pipe.components.values() if isinstance(model, torch.nn.Module)} == {dtype}


def test_own_class_runs_no_code_of_the_folder(saved, tmp_path):
    """A folder whose `pipeline.py` was tampered with still loads through our class, which never reads that file."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "pipeline.py").write_text("raise SystemExit('this ran')")
    assert _draw(MultiViewTilePipeline.from_pretrained(tmp_path)) == pytest.approx(saved[1], rel=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_override_and_swap_in_own_class(saved):
    """A scheduler passed to `from_pretrained` and one set afterwards are the same thing."""
    folder, _ = saved
    scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    passed = MultiViewTilePipeline.from_pretrained(str(folder), scheduler=scheduler)
    swapped = MultiViewTilePipeline.from_pretrained(folder)
    swapped.scheduler = EulerDiscreteScheduler.from_config(swapped.scheduler.config)
    assert _draw(passed) == pytest.approx(_draw(swapped), rel=1e-5)


def test_wrong_class_is_refused(saved):
    """A stage's folder is not the chain's."""
    with pytest.raises(InputError, match="holds a MultiViewTilePipeline"):
        hub_class("One2345PlusPlusPipeline").from_pretrained(saved[0])


def hub_class(name: str):
    """A class of that name with the mixin; enough for what reads the index."""
    return type(name, (hub.SelfContainedMixin, DiffusionPipeline), {})


def test_absent_parts_of_other_classes_are_ignored(saved, tmp_path):
    """Folders of Zero123++ name a safety checker that is not there."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model_index.json").write_text(json.dumps(_index(saved[0]) | {"safety_checker": [None, None]}))
    assert "safety_checker" not in MultiViewTilePipeline.load_config(tmp_path)
    assert _draw(MultiViewTilePipeline.from_pretrained(tmp_path)) == pytest.approx(saved[1], rel=1e-5)


class Uploads:
    """Stands in for the Hub: remembers the card of every folder that would go up."""

    def __init__(self, monkeypatch):
        self.cards = []
        monkeypatch.setattr(hub, "create_repo", lambda repo_id, **kwargs: type("Repo", (), {"repo_id": repo_id}))
        monkeypatch.setattr(MultiViewTilePipeline, "_upload_folder", self._upload, raising=False)
        monkeypatch.setattr(hub, "load_or_create_model_card", self._generic)

    def _upload(self, folder, repo_id, **kwargs):
        from pathlib import Path

        assert (Path(folder) / "pipeline.py").is_file()
        self.cards.append((repo_id, (Path(folder) / "README.md").read_text()))

    def _generic(self, repo_id, **kwargs):
        from huggingface_hub import ModelCard

        return ModelCard("---\nlibrary_name: diffusers\n---\ngeneric")


def test_model_card_survives_the_hub(saved, tmp_path, monkeypatch):
    """diffusers writes a generic card over whatever is there; ours goes up as it is, and a generic one only when we have none."""
    uploads = Uploads(monkeypatch)
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "README.md").write_text("our card")
    pipe = MultiViewTilePipeline.from_pretrained(tmp_path)
    pipe.push_to_hub("me/mine")
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/other")
    MultiViewTilePipeline.from_pretrained(saved[0]).push_to_hub("me/third")
    assert uploads.cards[:2] == [("me/mine", "our card"), ("me/other", "our card")]
    assert "generic" in uploads.cards[2][1]


def test_the_card_of_another_project_does_not_go_up(saved, tmp_path, monkeypatch):
    """A pipeline made from components has no card of its own, whatever lies in the working directory."""
    uploads = Uploads(monkeypatch)
    (tmp_path / "README.md").write_text("another project")
    monkeypatch.chdir(tmp_path)
    build_multiview().push_to_hub("me/mine")
    assert "generic" in uploads.cards[0][1]


def test_weights_from_a_file_give_the_very_same_pictures(tmp_path):
    """Mapped from a file they lie anywhere in memory, where a CPU's kernels may round otherwise; so they are laid out anew."""
    pipe = build_multiview()
    pipe.save_pretrained(tmp_path)
    loaded = MultiViewTilePipeline.from_pretrained(tmp_path)
    for part in (loaded.unet, loaded.vae, loaded.text_encoder, loaded.vision_encoder):
        assert all(weight.data_ptr() % 64 == 0 for weight in part.parameters())
    odd = torch.empty(4 * 8 + 1)[1:].view(8, 4)
    pipe.unet.conv_in.bias.data = odd.flatten()[:8].copy_(pipe.unet.conv_in.bias.data)
    assert pipe.unet.conv_in.bias.data_ptr() % 64
    before = pipe.unet.conv_in.bias
    again = MultiViewTilePipeline.from_pipe(pipe)
    assert again.unet.conv_in.bias is before and before.data_ptr() % 64 == 0
    assert _draw(again) == _draw(loaded)
