"""docs/multiview.md says what works: its Python runs, as one program, with tiny weights in place of those on the Hub."""

import json
from pathlib import Path

import pytest
import trimesh
from conftest import multiview_components
from test_multiview_controlnet import make_controlnet
from test_multiview_lora import adapt, save
from test_readme import blocks

from one2345pp import MultiViewTilePipeline
from one2345pp.cli import main


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "multiview.md").read_text()


def test_python_runs(tmp_path, monkeypatch):
    """Every block, in order; what it saves is there, and the names on the Hub that were replaced are all there are."""
    pytest.importorskip("peft")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    pipe = MultiViewTilePipeline(**multiview_components(), view_size=16)
    pipe.save_pretrained("zero123plus")
    make_controlnet(multiview_components()["unet"]).save_pretrained("controlnet")
    save(adapt(pipe, ["unet"]), "my-lora")
    train(tmp_path)
    program = "\n".join(blocks("python", TEXT))
    program = program.replace("sudo-ai/zero123plus-v1.2", "zero123plus")
    program = program.replace("sudo-ai/controlnet-zp12-normal-gen-v1", "controlnet")
    assert "sudo-ai" not in program
    names = {}
    exec(compile(program, "docs/multiview.md", "exec"), names)
    assert (tmp_path / "zero123plus-clay" / "model_index.json").is_file()
    assert len(names["tiles"]) == 4 and names["views"][0].mode == "RGBA"
    assert names["normals"].tobytes() != names["tile"].tobytes()


def train(folder: Path) -> None:
    """The commands of the page, on one box at 16 pixels; the repository's config with fewer steps and a tiny base."""
    box = trimesh.creation.box((0.5, 0.7, 0.4))
    box.export(folder / "meshes.glb")
    config = json.loads((ROOT / "configs" / "multiview-finetune.json").read_text())
    config |= {"base": "zero123plus", "view_size": 16, "reference_sizes": [16, 32]}
    for phase in config["phases"].values():
        phase |= {"max_steps": 2, "batch_size": 2, "mixed_precision": "no"}
    (folder / "configs").mkdir()
    (folder / "configs" / "multiview-finetune.json").write_text(json.dumps(config))
    commands = [line for line in "\n".join(blocks("bash", TEXT)).splitlines() if line.startswith("one2345pp ")]
    assert [command.split()[1] for command in commands] == ["prepare", "train"]
    for command in commands:
        command = command.replace(" meshes ", " meshes.glb ").replace(
            "--frames 2 --view-size 320", "--frames 1 --view-size 16"
        )
        assert main(command.split()[1:]) == 0
