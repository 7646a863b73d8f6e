"""docs/conversion.md says what works: its commands run, in order, with tiny folders and files under the names it uses."""

import shlex
from pathlib import Path

import torch
from conftest import multiview_components
from test_conversion import assert_same, save_stable_diffusion, weights
from test_readme import blocks

from one2345pp import MultiViewTilePipeline, cli
from one2345pp.conversion.single_file import file_from_folder
from one2345pp.conversion.weights import read_tensors


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "conversion.md").read_text()


def test_commands_run(tmp_path, monkeypatch):
    """Every command, and what the text says of the result; other documents that it names are there."""
    monkeypatch.chdir(tmp_path)
    save_stable_diffusion(Path("stable-diffusion-2"))
    multiview_components()["vision_encoder"].save_pretrained("clip-vit-h")
    file_from_folder("stable-diffusion-2", "all.safetensors")
    torch.save({"state_dict": read_tensors("all.safetensors")}, "768-v-ema.ckpt")
    MultiViewTilePipeline(**multiview_components(), view_size=16).save_pretrained("zero123plus-v1.2")
    torch.save(multiview_components()["unet"].state_dict(), "diffusion_pytorch_model.bin")
    commands = [line for block in blocks("bash", TEXT) for line in block.splitlines()]
    assert {shlex.split(command)[2] for command in commands} == {
        "stable-diffusion",
        "single-file",
        "unet",
        "to-single-file",
    }
    for command in commands:
        assert cli.main([*shlex.split(command)[1:], "--quiet"]) == 0, command
    first = MultiViewTilePipeline.from_pretrained("first-stage")
    assert (first.config.view_size, first.feature_extractor_vae.crop_size["height"]) == (320, 512)
    for name in ("unet", "vae", "text_encoder"):
        assert_same(weights("stable-diffusion-2", name), weights("my-stable-diffusion-2", name))
    for name in ("unet", "vision_encoder"):
        half = {key: tensor.half() for key, tensor in weights("zero123plus-white", name).items()}
        assert_same(half, weights("zero123plus-again", name))
    unet = read_tensors("zero123plus-white/unet/diffusion_pytorch_model.safetensors")
    assert_same(unet, read_tensors("diffusion_pytorch_model.bin"))
    for name in ("multiview.md", "training.md"):
        assert f"]({name})" in TEXT and (ROOT / "docs" / name).is_file()
