"""docs/volume.md says what a volume is and how to bring views: its Python and commands run, with tiny weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from test_readme import blocks
from test_training_volume import CONFIG

import one2345pp
from one2345pp import CameraRig, One2345PlusPlusPipeline
from one2345pp.cli import main
from one2345pp.geometry.tile import make_tile


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "volume.md").read_text()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with `photos/` (a box from six sides, with cameras) and `tile.png`, the working directory."""
    pixels = np.zeros((6, 24, 24, 4), np.uint8)
    pixels[:, 6:18, 6:18] = (200, 60, 40, 255)
    views = [Image.fromarray(view) for view in pixels]
    (tmp_path / "photos").mkdir()
    names = [f"{number}.png" for number in range(6)]
    for name, view in zip(names, views, strict=True):
        view.save(tmp_path / "photos" / name)
    CameraRig.named("zero123plus-v1.2").save(tmp_path / "photos" / "cameras.json", names)
    grey = [Image.alpha_composite(Image.new("RGBA", view.size, (127, 127, 127, 255)), view) for view in views]
    make_tile([view.convert("RGB") for view in grey]).save(tmp_path / "tile.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_runs(place, tiny_chain_folder, monkeypatch):
    """Every block, in order, as one program; what it saves is there and equals what was saved."""
    monkeypatch.setattr(one2345pp, "default_checkpoint", lambda: tiny_chain_folder)
    names = {}
    exec(compile("\n".join(blocks("python", TEXT)), "docs/volume.md", "exec"), names)
    volume = names["volume"]
    assert (names["grid"][0].shape[0], len(names["mesh"].faces) > 0) == (volume.resolution, True)
    assert np.array_equal(np.asarray(names["out"].volumes[0].sdf), np.asarray(volume.sdf))
    assert len(names["objects"].volumes) == 2 and len(names["fast"]) > 0
    assert Image.open(place / "slices.png").size == (6 * 128 + 5 * 4, 2 * 128 + 4)


def test_commands_run(place, tiny_chain_folder):
    """Every command, with the tiny checkpoint and few steps, writes its mesh; trainings write their networks, with the objectives
    of the shipped configs and tiny networks, and the checkpoint's first stage as the one that the text asks for."""
    pipe = One2345PlusPlusPipeline.from_pretrained(tiny_chain_folder)
    pipe.multiview.save_pretrained(place / "runs" / "multiview" / "pipeline")
    (place / "configs").mkdir()
    (place / "meshes").mkdir()
    trimesh.creation.box((0.6, 0.5, 0.4)).export(place / "meshes" / "box.ply")
    for stage, config in CONFIG.items():
        shipped = json.loads((ROOT / "configs" / f"{stage}-small.json").read_text())
        tiny = {
            "unet": config["unet"] | {"global_channels": pipe.multiview.vision_encoder.config.projection_dim},
            "training": config["training"] | {"max_steps": 1},
            "objective": shipped["objective"],
        }
        (place / "configs" / f"{stage}-small.json").write_text(json.dumps(config | tiny))
    extra = {
        "reconstruct": ["--model", str(tiny_chain_folder), "--no-refine"],
        "prepare": ["--view-size", "16", "--resolution", "16", "--workers", "1"],
        "train": ["--device", "cpu"],
    }
    for block in blocks("bash", TEXT):
        for line in block.splitlines():
            program, command, *arguments = line.split()
            assert program == "one2345pp"
            assert main([command, *arguments, *extra[command], "--quiet"]) == 0
            output = place / arguments[arguments.index("-o") + 1]
            assert output.exists() if command != "train" else list(output.glob("*_unet/*.safetensors"))
            if command == "reconstruct":
                output.unlink()
