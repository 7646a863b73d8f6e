"""The checkpoint in the package: its size and form, and that one command makes the same textured mesh twice within its memory."""

import json
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from one2345pp import default_checkpoint


ROOT = Path(__file__).parents[1]

FOLDER = default_checkpoint()


GENERATE = """
import resource, sys, time
from one2345pp.cli import main
start = time.monotonic()
status = main(["generate", sys.argv[1], "-o", sys.argv[2], "--preview", sys.argv[3], "--quiet"])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.monotonic() - start)
"""


def test_size_and_card():
    """At most 60 MB, with a card that says what it cannot do."""
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 60e6
    card = (FOLDER / "README.md").read_text()
    assert "cannot" in card


def test_weights_are_half_on_disk_and_float_in_memory():
    from safetensors import safe_open

    from one2345pp import One2345PlusPlusPipeline

    for file in FOLDER.glob("*/*.safetensors"):
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118, not a dict
        assert kinds <= {"F16", "I64"}, file
    pipe = One2345PlusPlusPipeline.from_pretrained(FOLDER)
    assert str(pipe.unet.dtype) == str(pipe.occupancy_unet.dtype) == "torch.float32"


def test_views_are_those_of_the_rig_that_is_asked_for():
    """Oracle: how high beside its width a disc looks from the cameras of each named rig, whose elevations differ by 10 degrees."""
    import torch

    from one2345pp import CameraRig, One2345PlusPlusPipeline
    from one2345pp.geometry.framing import frame_object
    from one2345pp.geometry.mesh import normalize_to_sphere
    from one2345pp.geometry.render import render

    turn = trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0])
    disc = normalize_to_sphere(trimesh.creation.cylinder(1.0, 0.15).apply_transform(turn))
    disc.visual.vertex_colors = [200, 60, 40, 255]
    camera = CameraRig.from_angles([0.0], 10.0, 0.52, 1.9)
    picture = frame_object(Image.fromarray(render(disc, camera, 128)[0]))
    pipe = One2345PlusPlusPipeline.from_pretrained(FOLDER).multiview
    assert set(pipe.rigs) == set(CameraRig.names())

    def shape_of(view) -> float:
        mask = np.asarray(view)[..., 3] >= 128
        return mask.any(1).sum() / mask.any(0).sum()

    for rig in pipe.rigs:
        views = pipe(picture, rig=rig, generator=torch.Generator().manual_seed(0), transparent=True).views[0]
        truth = render(disc, CameraRig.named(rig), 48)
        assert np.abs(np.subtract([*map(shape_of, views)], [*map(shape_of, truth)])).mean() < 0.07, rig


def test_a_picture_says_how_high_it_looks():
    """Oracle: named shapes, which no network was trained on, drawn from the horizon and from 35 degrees above it."""
    from one2345pp import CameraRig, One2345PlusPlusPipeline
    from one2345pp.data.shapes import SHAPES, shape
    from one2345pp.geometry.render import render
    from one2345pp.pipelines.picture.guide import find_elevations

    pipe = One2345PlusPlusPipeline.from_pretrained(FOLDER)
    found = []
    for elevation in (0.0, 35.0):
        camera = CameraRig.from_angles([0.0], elevation, 0.6, 1.8)
        pictures = [Image.fromarray(render(shape(name), camera, 128)[0]) for name in SHAPES]
        found.append(find_elevations(pipe.elevation_estimator, pictures, None, pipe.device))
    low, high = np.array(found)
    assert np.mean(high - low) > 12 and np.mean(high > low) >= 0.8


def test_any_diffusers_program_loads_it(fresh_python):
    code = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(pipe).__name__, type(pipe.occupancy_scheduler).__name__)
"""
    assert fresh_python(code, FOLDER).split() == ["One2345PlusPlusPipeline", "LogSNRScheduler"]


def test_paths_in_its_files_are_nobodys():
    """No local path leaked into the configs."""
    for file in FOLDER.rglob("*.json"):
        if file.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(file.read_text()), file


def test_one_image_becomes_the_same_textured_mesh_twice(fresh_python, tmp_path):
    """README command 1 without the installation: exit 0, at most 4 GiB, a texture, and the same bytes again."""
    contents = []
    for run in ("first", "second"):
        mesh, preview = tmp_path / f"{run}.glb", tmp_path / f"{run}.png"
        printed = fresh_python(GENERATE, ROOT / "examples" / "mushroom.png", mesh, preview)
        status, gibibytes, _seconds = printed.split()[-3:]
        assert status == "0"
        assert float(gibibytes) < 4
        contents.append(mesh.read_bytes())
    assert contents[0] == contents[1]
    loaded = trimesh.load(tmp_path / "first.glb", force="mesh")
    assert len(loaded.faces) > 100
    assert np.linalg.norm(loaded.vertices, axis=1).max() < 0.6
    assert np.asarray(loaded.visual.material.baseColorTexture).std() > 1
    assert np.asarray(Image.open(tmp_path / "first.png").convert("L")).std() > 5
