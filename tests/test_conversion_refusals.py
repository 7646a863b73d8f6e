"""`convert` for first stages: what cannot be used is refused in one line before anything is written, and no code of a file runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import multiview_components
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_conversion import convert, make_place, save_stable_diffusion, stable_diffusion_components

from one2345pp import InputError
from one2345pp.conversion.single_file import file_from_folder
from one2345pp.conversion.stable_diffusion import multiview_from_stable_diffusion
from one2345pp.conversion.weights import read_tensors


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def spoil(place: Path) -> None:
    """Inputs that are wrong in one way each."""
    parts = stable_diffusion_components()
    epsilon = PNDMScheduler.from_config(parts["scheduler"].config, prediction_type="epsilon")
    save_stable_diffusion(place / "base", scheduler=epsilon)
    wide = transformers.CLIPVisionConfig.from_dict(
        {**multiview_components()["vision_encoder"].config.to_dict(), "projection_dim": 20}
    )
    transformers.CLIPVisionModelWithProjection(wide).save_pretrained(place / "wide")
    for name, file in (("torn", "vae/diffusion_pytorch_model.safetensors"), ("untold", "scheduler")):
        shutil.copytree(place / "sd2", place / name)
        shutil.rmtree(place / name / file) if (place / name / file).is_dir() else (place / name / file).unlink()
    shutil.copytree(place / "sd2", place / "mute", ignore=shutil.ignore_patterns("tokenizer"))
    shutil.copytree(place / "sd2", place / "short")
    tensors = load_file(place / "short/text_encoder/model.safetensors")
    tensors.popitem()
    save_file(tensors, place / "short/text_encoder/model.safetensors", metadata={"format": "pt"})

    file_from_folder("sd2", "good.safetensors")
    good = load_file("good.safetensors")
    save_file({k: v for k, v in good.items() if not k.startswith("first_stage")}, "no-vae.safetensors")
    save_file({k: v for k, v in good.items() if "output_blocks.4" not in k}, "holes.safetensors")
    save_file(good, "small.safetensors", metadata={"one2345pp": json.dumps({"../model_index.json": "{}"})})
    index = {"model_index.json": json.dumps({"../evil": ["diffusers", "UNet2DConditionModel"]})}
    save_file(good, "evil.safetensors", metadata={"one2345pp": json.dumps(index)})
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:5000])
    torch.save({"state_dict": good, "callback": Path("x")}, "code.ckpt")
    first = {k.replace("cond_stage_model.model", "cond_stage_model.transformer"): v for k, v in good.items()}
    save_file(first, "first.safetensors")
    unet = torch.load("unet.bin", weights_only=True)
    torch.save({k: v for k, v in unet.items() if "mid_block" not in k}, "partial.bin")
    torch.save(unet | {"conv_in.weight": torch.ones(8, 5, 3, 3)}, "misshaped.bin")
    torch.save({f"{p}.{k}": v for k, v in unet.items() for p in ("a", "b")}, "twice.bin")
    torch.save(multiview_components()["vae"].state_dict(), "vae.bin")


SD2 = "--vision-encoder clip -o out --view-size 16 --reference-size 16"
REFUSALS = [
    (f"stable-diffusion nothing {SD2}", "nothing: no such folder"),
    (f"stable-diffusion clip {SD2}", "model_index.json"),
    (f"stable-diffusion base {SD2}", "'epsilon', expected 'v_prediction'"),
    (f"stable-diffusion torn {SD2}", "torn/vae: has no weights"),
    (f"stable-diffusion untold {SD2}", "scheduler_config.json: no such file"),
    (f"stable-diffusion mute {SD2}", "mute/tokenizer: no such folder"),
    (f"stable-diffusion short {SD2}", "1 missing keys"),
    ("stable-diffusion sd2 --vision-encoder wide -o out", "to 20 numbers, but the text encoder has width 12"),
    ("stable-diffusion sd2 --vision-encoder nothing -o out", "nothing: no such folder"),
    ("stable-diffusion sd2 --vision-encoder sd2/text_encoder -o out", "'clip_text_model', expected"),
    ("stable-diffusion sd2 --vision-encoder clip --view-size 15 -o out", "view size: got 15, expected a multiple of 2"),
    (f"stable-diffusion sd2 {SD2.replace('-o out', '-o clip')}", "clip: exists already"),
    (f"stable-diffusion sd2 {SD2.replace('-o out', '-o no/out')}", "folder no does not exist"),
    ("stable-diffusion sd2 -o out", "--vision-encoder"),
    ("single-file nothing.ckpt -o out", "nothing.ckpt: no such file"),
    ("single-file sd2/model_index.json -o out", "got '.json', expected .safetensors"),
    ("single-file no-vae.safetensors --like sd2 -o out", "has no vae"),
    ("single-file first.safetensors --like sd2 -o out", "Stable Diffusion 1"),
    ("single-file holes.safetensors --like sd2 -o out", "holes.safetensors: unet: does not fit"),
    ("single-file good.safetensors --like multiview -o out", "good.safetensors: unet: does not fit"),
    ("single-file good.safetensors --like mute -o out", "names tokenizer, which is not there"),
    ("single-file small.safetensors -o out", "'../model_index.json'"),
    ("single-file evil.safetensors -o out", "evil.safetensors: its model_index.json names '../evil'"),
    ("single-file cut.safetensors --like sd2 -o out", "not a whole file"),
    ("single-file code.ckpt --like sd2 -o out", "more than tensors"),
    ("single-file good.safetensors -o sd2", "sd2: exists already"),
    ("unet nothing.bin --into multiview -o out", "nothing.bin: no such file"),
    ("unet partial.bin --into multiview -o out", "lacks"),
    ("unet misshaped.bin --into multiview -o out", "conv_in.weight has shape (8, 5, 3, 3), expected (8, 4, 3, 3)"),
    ("unet twice.bin --into multiview -o out", "has 2 UNets"),
    ("unet vae.bin --into multiview -o out", "has no UNet"),
    ("unet unet.bin --into sd2 -o out", "does not fit the UNet2DConditionModel"),
    ("unet unet.bin --into clip -o out", "model_index.json"),
    ("unet good.safetensors --into multiview -o out", "convert single-file"),
    ("unet multiview --into multiview -o unet.bin", "exists already"),
    ("to-single-file sd2 -o out", "ends with .safetensors"),
    ("to-single-file sd2 -o good.safetensors", "exists already"),
    ("to-single-file mute -o out.safetensors", "names tokenizer, which is not there"),
    ("to-single-file torn -o out.safetensors", "torn/vae: has no weights"),
]


def test_what_cannot_be_used_is_refused_before_anything_is_written(place, capsys):
    """Status 2, one line that says what is wrong, and no file more or less than before; the spoilt inputs are made once."""
    spoil(place)
    before = {path.name for path in place.iterdir()}
    for command, words in REFUSALS:
        capsys.readouterr()
        status, err = convert(command, capsys)
        assert status == 2, (command, err)
        assert err.count("\n") == 1 and words in err, (command, err)
        assert {path.name for path in place.iterdir()} == before, command


def test_a_failure_while_writing_leaves_nothing(place, monkeypatch):
    """A disk that fills up half way: neither an output nor a part of one stays."""

    def fail(self, *args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", fail)
    before = {path.name for path in place.iterdir()}
    with pytest.raises(OSError, match="no space"):
        multiview_from_stable_diffusion("sd2", "clip", "out", view_size=16, reference_size=16)
    assert {path.name for path in place.iterdir()} == before


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_what_the_original_layout_cannot_hold_is_refused(place, part):
    """An embedding it has no name for, and a text layer that the way back leaves out: no file that would lose them is written."""
    old = stable_diffusion_components()[part].config
    if part == "unet":
        settings = {name: value for name, value in old.items() if not name.startswith("_")}
        network = UNet2DConditionModel(**settings | {"class_embed_type": "timestep"})
    else:
        network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**old.to_dict() | {"num_hidden_layers": 24}))
    save_stable_diffusion(Path("odd"), **{part: network})
    with pytest.raises(InputError, match="no place in the original layout"):
        file_from_folder("odd", "odd.safetensors")
    assert not Path("odd.safetensors").exists()


def test_files_are_read_without_running_them(place):
    """A pickle that would run code is refused, and does not run it."""

    class Code:
        def __reduce__(self):
            return (Path.touch, (Path("ran"),))

    torch.save({"conv_in.weight": torch.ones(1), "code": Code()}, "code.bin")
    with pytest.raises(InputError, match="more than tensors"):
        read_tensors("code.bin")
    assert not Path("ran").exists()
