"""docs/stages.md says what works: its Python runs, as one program, with tiny weights and stand-ins for other people's models."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from conftest import build_multiview
from PIL import Image
from test_readme import blocks

import one2345pp
from one2345pp import CameraRig, GuideSettings, One2345PlusPlusPipeline, Views
from one2345pp.cli import build_parser
from one2345pp.data.shapes import shape
from one2345pp.geometry.render import render


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "stages.md").read_text()
RIG = CameraRig.orthographic([0, 90, 180, 270], 0)


def somebodys_pipeline(image, num_inference_steps, generator):
    """Draws a house, whatever it is shown."""
    assert image.mode == "RGBA"
    return SimpleNamespace(images=[Image.fromarray(view) for view in render(shape("house"), RIG, 48)])


def somebodys_model(images, camera_to_world, fov):
    """Makes a rocket, whatever it is shown."""
    assert len(images) == len(camera_to_world) == len(fov) == 6
    return shape("rocket")


def test_python_runs(tmp_path, tiny_chain_folder, monkeypatch):
    """Every block, in order. The first adapter's views are what its chain returns, the second's mesh is what is painted; what is saved
    is there, with what was set on a stage."""
    monkeypatch.setattr(one2345pp, "default_checkpoint", lambda: tiny_chain_folder)
    monkeypatch.chdir(tmp_path)
    mug = render(shape("mug"), CameraRig.from_angles([0], 15, 0.7, 1.6), 64)[0]
    Image.fromarray(mug).save("mug.png")
    build_multiview().save_pretrained("zero123plus")
    program = "\n".join(blocks("python", TEXT)).replace("sudo-ai/zero123plus-v1.2", "zero123plus")
    program = program.replace('mesh = chain("mug.png")', 'out = chain("mug.png")\nouts.append(out)\nmesh = out')
    names = {"somebodys_pipeline": somebodys_pipeline, "somebodys_model": somebodys_model, "outs": []}
    exec(compile(program, "docs/stages.md", "exec"), names)
    first, second = names["outs"]
    assert first.views[0].rig == RIG and first.volumes[0] is not None
    assert second.volumes == [None] and len(second.views[0]) == 6
    assert np.allclose(second.coarse_meshes[0].bounds, shape("rocket").bounds)
    assert all(out.meshes[0].visual.uv is not None for out in (first, second, names["out"]))
    assert len(Views.load("mug-views")) == 6
    saved = One2345PlusPlusPipeline.from_pretrained("my-chain")
    assert saved.guide is None and saved.volume.config.max_voxels == 2_000_000


def test_the_guides_settings_are_all_described():
    for name in GuideSettings.__dataclass_fields__:
        assert f"`{name}`" in TEXT, name


def test_commands_parse():
    commands = [line for block in blocks("bash", TEXT) for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        build_parser().parse_args(command.split()[1:])
