"""docs/multiview.md says what works: its Python runs, as one program, with tiny weights in place of those on the Hub."""

from pathlib import Path

import pytest
from conftest import multiview_components
from test_multiview_controlnet import make_controlnet
from test_multiview_lora import random_lora
from test_readme import blocks

from one2345pp import MultiViewTilePipeline


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "multiview.md").read_text()


def test_python_runs(tmp_path, monkeypatch):
    """Every block, in order; what it saves is there, and the names on the Hub that were replaced are all there are."""
    pytest.importorskip("peft")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    MultiViewTilePipeline(**multiview_components(), view_size=16).save_pretrained("zero123plus")
    make_controlnet(multiview_components()["unet"]).save_pretrained("controlnet")
    layers = random_lora(multiview_components()["unet"], 0, ["to_q", "to_v"])
    MultiViewTilePipeline.save_lora_weights("my-lora", unet_lora_layers=layers)
    program = "\n".join(blocks("python", TEXT))
    program = program.replace("sudo-ai/zero123plus-v1.2", "zero123plus")
    program = program.replace("sudo-ai/controlnet-zp12-normal-gen-v1", "controlnet")
    assert "sudo-ai" not in program
    names = {}
    exec(compile(program, "docs/multiview.md", "exec"), names)
    assert (tmp_path / "zero123plus-clay" / "model_index.json").is_file()
    assert len(names["tiles"]) == 4 and names["views"][0].mode == "RGBA"
    assert names["normals"].tobytes() != names["tile"].tobytes()
