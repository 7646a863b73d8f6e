"""The command line: exit statuses, one line of error, outputs in their places, several inputs, determinism."""

import json
import logging
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from one2345pp import CameraRig, cli, commands
from one2345pp.data.shapes import shape
from one2345pp.errors import InputError
from one2345pp.geometry.mesh import load_mesh
from one2345pp.geometry.render import render
from one2345pp.geometry.repair import is_solid
from one2345pp.outputs import MESH_SUFFIXES, plan


FAST = "--steps 1 --occupancy-steps 2 --sparse-steps 1 --texture-steps 2 --texture-size 64 --faces 400"


def run(command: str, capsys) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line."""
    capsys.readouterr()
    try:
        status = cli.main(shlex.split(command))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a picture, a bad picture and a folder of views."""
    monkeypatch.chdir(tmp_path)
    rig = CameraRig.named("zero123plus-v1.2")
    Image.fromarray(render(shape("mug"), CameraRig.from_angles([0], 15, 0.7, 1.6), 64)[0]).save("mug.png")
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "views").mkdir()
    names = [f"{i}.png" for i in range(6)]
    for name, view in zip(names, render(shape("mug"), rig, 48), strict=True):
        Image.fromarray(view).save(tmp_path / "views" / name)
    rig.save(tmp_path / "views" / "cameras.json", names)
    return tmp_path


def test_every_kind_of_mesh_file_has_a_writer():
    """The command line's list, which imports nothing, is the exporter's."""
    from one2345pp.geometry import export

    assert set(MESH_SUFFIXES) == set(export.WRITERS)


@pytest.mark.parametrize(
    "command, words",
    [
        ("", "COMMAND"),
        ("frobnicate", "frobnicate"),
        ("generate", "-o/--output"),
        ("generate -o a.glb", "either images, or --prompt"),
        ("generate mug.png --prompt x -o a.glb", "either images, or --prompt"),
        ("generate --prompt x -o a.glb", "--text-to-image"),
        ("generate mug.png -o a.fbx", ".fbx"),
        ("generate mug.png -o nowhere/a.glb", "nowhere does not exist"),
        ("generate mug.png -o bad.png/a.glb", "bad.png does not exist"),
        ("generate mug.png -o a.glb --model nothing", "neither a folder nor a Hub id"),
        ("generate mug.png mug.png -o a.glb", "2 inputs"),
        ("generate mug.png -o a.glb --preview a.jpg", "--preview"),
        ("generate mug.png -o a.glb --preview nowhere/a.png", "nowhere does not exist"),
        ("generate mug.png -o a.glb --save-intermediates mug.png", "is a file"),
        ("generate mug.png -o a.obj --unlit", "only a .glb"),
        ("generate mug.png -o a.glb --shading normal", "--preview FILE"),
        ("generate mug.png -o a.glb --preview a.png --shading shiny", "shiny"),
        ("generate mug.png -o a.glb --steps 0", "at least 1"),
        ("generate mug.png -o a.glb --steps many", "--steps"),
        ("generate mug.png -o a.glb --ste 3", "--ste"),
        ("generate mug.png -o a.glb --model views", "model_index.json"),
        ("generate mug.png -o a.glb --texture-size 100000", "16 to 16384"),
        ("generate mug.png -o a.glb --seed -1", "--seed"),
        ("generate mug.png -o a.glb --seed 99999999999999999999999", "--seed"),
        ("generate mug.png -o a.glb --elevation 200", "-90 to 90"),
        ("generate mug.png -o a.glb --preview mug.png", "mug.png: is an input"),
        ("generate --prompt '' --text-to-image x -o a.glb", "--prompt: is empty"),
        ("reconstruct views -o a.glb --save-intermediates views", "cameras.json: is an input"),
        ("refine mug.png views -o mug.png", "-o mug.png"),
        ("refine mug.png views -o a.glb --preview views/0.png", "0.png: is an input"),
        ("prepare -o data --shapes -3", "--shapes"),
        ("reconstruct views -o a.glb --rig nothing", "zero123plus-v1.2"),
        ("prepare nothing -o data", "nothing: no such"),
        ("train sparse nothing.json", "nothing.json: no such file"),
        ("train sparse bad.png", "is not a JSON file"),
        ("train sparse views/cameras.json", "--data"),
        ("train sparse views/cameras.json --data nothing -o out", "one2345pp prepare"),
        ("evaluate --pred nothing --gt views -o r.json", "nothing: no such folder"),
        ("evaluate --pred views --gt views -o nowhere/r.json", "nowhere does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else None,
)
def test_what_cannot_be_used_is_refused_in_one_line(place, capsys, command, words):
    """Status 2, one line that has the offending word, nothing on stdout, and nothing was made."""
    before = {path.name for path in place.iterdir()}
    status, out, err = run(command, capsys)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and words in err and err.startswith("one2345pp")
    assert {path.name for path in place.iterdir()} == before


def test_plan_gives_every_input_its_own_names(tmp_path):
    """Two inputs of one stem do not overwrite each other, nor do their previews and intermediates."""
    from pathlib import Path

    sources = [Path("a/mug.png"), Path("b/mug.jpg"), Path("cat.png")]
    jobs = plan(sources, tmp_path / "out", tmp_path / "sheet.png", tmp_path / "parts")
    assert [job.mesh.name for job in jobs] == ["mug.glb", "mug-2.glb", "cat.glb"]
    assert [job.preview.name for job in jobs] == ["sheet-mug.png", "sheet-mug-2.png", "sheet-cat.png"]
    assert [job.intermediates.name for job in jobs] == ["mug", "mug-2", "cat"]
    (single,) = plan(sources[:1], tmp_path / "x.OBJ", tmp_path / "sheet.gif")
    assert (single.mesh.name, single.preview.name, single.intermediates) == ("x.OBJ", "sheet.gif", None)


def test_nothing_that_is_read_is_written_over(tmp_path):
    """Inputs, files of input folders, two outputs of one name: refused before anything is made. A picture's OBJ may lie beside it."""
    picture, photos = tmp_path / "mug.png", tmp_path / "photos"
    (photos / "views").mkdir(parents=True)
    for file in (picture, photos / "views" / "000.png", photos / "cameras.json"):
        file.touch()
    before = set(tmp_path.rglob("*"))
    for call, name in (
        (lambda: plan([picture], tmp_path / "a.glb", picture), "mug.png: is an input"),
        (lambda: plan([photos], tmp_path / "a.glb", None, photos), "cameras.json: is an input"),
        (lambda: plan([picture], tmp_path / "new" / "..", None, photos, inputs=[photos]), "cameras.json: is an input"),
        (lambda: plan([photos / "coarse.ply"], tmp_path / "a.obj", tmp_path / "a_texture.png"), "two outputs"),
    ):
        with pytest.raises(InputError, match=name):
            call()
    assert set(tmp_path.rglob("*")) == before
    (job,) = plan([picture], tmp_path / "mug.obj", tmp_path / "mug.gif")
    assert picture not in job.files() and len(set(job.files())) == 4


def test_info(capsys):
    """Works without a checkpoint, names versions and the device."""
    status, out, _ = run("info", capsys)
    assert status == 0
    assert all(word in out for word in ("torch", "diffusers", "device", "checkpoint"))


@pytest.mark.parametrize("command", ["", "generate", "reconstruct", "refine", "prepare", "train", "evaluate", "info"])
def test_help(command, capsys):
    """Every command explains itself and offers the shared options."""
    status, out, _ = run(f"{command} --help", capsys)
    assert status == 0
    assert not command or all(option in out for option in ("--model", "--seed", "--device", "--dtype", "--quiet"))


def test_generate_writes_everything_that_was_asked_for(place, tiny_chain_folder, capsys):
    """One command: mesh, preview, intermediates; reconstructing from the intermediates and refining take the same folder."""
    shared = f"--model {tiny_chain_folder} --seed 3 --device cpu"
    status, out, err = run(
        f"generate mug.png -o a.glb --preview a.png --save-intermediates parts {FAST} {shared}", capsys
    )
    assert (status, err) == (0, "")
    assert out.startswith("a.glb")
    mesh = trimesh.load("a.glb", force="mesh")
    assert 0 < len(mesh.faces) <= 400 and mesh.visual.uv is not None
    assert Image.open("a.png").width > 600
    assert {path.name for path in (place / "parts").iterdir()} == {
        "views",
        "cameras.json",
        "volume.safetensors",
        "coarse.ply",
    }
    assert len(json.loads((place / "parts" / "cameras.json").read_text())["frames"]) == 6

    fast = FAST.replace("--steps 1 ", "")
    status, _, err = run(f"reconstruct views -o b.obj --no-refine --preview b.gif {fast} {shared}", capsys)
    assert status == 0 and re.fullmatch(
        r"one2345pp: views: the mesh agrees with only \d+% of .*\n", err
    )  # random weights
    assert (place / "b.obj").is_file() and Image.open("b.gif").n_frames > 10
    texture = "--texture-steps 2 --texture-size 64 --quiet"
    preview = "--preview c.png --shading normal --shading wireframe"
    status, out, err = run(f"refine parts/coarse.ply parts -o c.glb --unlit {preview} {texture} {shared}", capsys)
    assert (status, out, err) == (0, "", "") and b"KHR_materials_unlit" in (place / "c.glb").read_bytes()
    assert Image.open("c.png").height > Image.open("a.png").height > 300  # three rows, and two


def test_mp4_without_its_extra_is_refused_before_any_work(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    status, out, err = run("generate mug.png -o a.glb --preview a.mp4", capsys)
    assert (status, out) == (2, "") and "pip install 'one2345pp[video]'" in err and err.count("\n") == 1


def test_watertight_files_for_printing(place, tiny_chain_folder, capsys):
    """Oracle: what a slicer reads. A punched ball comes out closed, as STL with its volume, as GLB, which has cuts, welded."""
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.4)
    hole = np.linalg.norm(ball.triangles_center - [0, 0.4, 0], axis=1) < 0.05
    trimesh.Trimesh(ball.vertices, ball.faces[~hole], process=False).export("punched.ply")
    options = f"--texture-steps 1 --texture-size 64 --faces 1000 --quiet --model {tiny_chain_folder}"
    for name in ("a.stl", "a.glb", "a.ply"):
        status, out, err = run(f"refine punched.ply views -o {name} --watertight {options}", capsys)
        assert (status, out, err) == (0, "", "")
        mesh = load_mesh(name)
        assert is_solid(mesh) and mesh.volume == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.02)
        assert len(mesh.faces) <= 1000
    assert trimesh.load("a.ply", process=False).is_watertight  # one vertex a place, with nothing to weld
    assert run(f"refine punched.ply views -o open.stl {options}", capsys)[0] == 0
    assert not is_solid(load_mesh("open.stl"))
    fast = FAST.replace("--steps 1 ", "")
    shared = f"--no-refine {fast} --model {tiny_chain_folder} --quiet"
    assert run(f"reconstruct views -o b.stl --watertight {shared}", capsys)[0] == 0
    assert is_solid(load_mesh("b.stl"))


def test_a_bad_input_does_not_stop_the_others(place, tiny_chain_folder, capsys):
    """Status 2 and one line for the bad one; the good ones are written, the same bytes whatever their order and company."""
    options = f"--no-refine {FAST} --model {tiny_chain_folder} --quiet"
    status, out, err = run(f"generate bad.png mug.png missing.png mug.png -o all {options}", capsys)
    assert (status, out) == (2, "")
    assert err.count("\n") == 2 and "bad.png" in err and "missing.png" in err
    assert {path.name for path in (place / "all").iterdir()} == {"mug.glb", "mug-2.glb"}
    status, _, _ = run(f"generate mug.png -o alone.glb {options}", capsys)
    first, second, alone = (trimesh.load(p, force="mesh") for p in ("all/mug.glb", "all/mug-2.glb", "alone.glb"))
    assert status == 0
    assert np.array_equal(first.vertices, second.vertices) and np.array_equal(first.vertices, alone.vertices)


def test_a_failure_inside_is_status_1(place, tiny_chain_folder, capsys, monkeypatch):
    """A bug is not the person's input: status 1 and a traceback; the other inputs are still written."""
    from one2345pp import outputs

    original = outputs.Job.write

    def write(self, *args):
        if self.mesh.name == "mug.glb":
            raise RuntimeError("out of luck")
        original(self, *args)

    monkeypatch.setattr(outputs.Job, "write", write)
    status, _, err = run(
        f"generate mug.png mug.png bad.png -o all --no-refine {FAST} --model {tiny_chain_folder}", capsys
    )
    assert status == 1
    assert "failed: mug.png: RuntimeError: out of luck" in err and "Traceback" in err
    assert [path.name for path in (place / "all").iterdir()] == ["mug-2.glb"]


def test_prepare_and_evaluate(place, capsys):
    """A data set from a folder of meshes; a report that finds identical meshes identical."""
    (place / "meshes").mkdir()
    shape("house").export(place / "meshes" / "house.glb")
    status, _, err = run("prepare meshes -o data --frames 1 --view-size 32 --resolution 16 --workers 1", capsys)
    assert (status, err) == (0, "")
    assert (place / "data" / "house.0.zip").is_file()
    (place / "meshes" / "broken.glb").write_text("broken")
    status, _, err = run("prepare meshes -o data --frames 1 --view-size 32 --resolution 16 --workers 1", capsys)
    assert status == 2 and "broken" in err
    (place / "meshes" / "broken.glb").unlink()
    options = "--rings zero123plus-v1.2 --frames 1 --view-size 16 --workers 1"
    assert run(f"prepare meshes --shapes 1 -o rings {options}", capsys)[0] == 0
    assert {path.name for path in (place / "rings").glob("*.zip")} == {"house.0.zip", "procedural_00000.0.zip"}
    status, _, err = run(f"prepare -o nothing {options}", capsys)
    assert status == 2 and "none given" in err and not (place / "nothing").exists()
    (place / "pred").mkdir()
    shutil.copy(place / "meshes" / "house.glb", place / "pred")
    for folder in ("pred", "meshes"):
        (place / folder / "empty.obj").write_text("v 0 0 0\n")
    status, out, err = run("evaluate --pred pred --gt meshes -o part.json", capsys)
    assert status == 2 and "house" in out and "empty" in err and err.count("\n") == 1
    (place / "meshes" / "empty.obj").unlink()
    status, out, _ = run("evaluate --pred meshes --gt meshes -o report.json", capsys)
    assert status == 0 and "house" in out
    report = json.loads((place / "report.json").read_text())
    assert report["counts"]["measured"] == 1


# --- telling ----------------------------------------------------------------------------------------------------------


def test_the_elevation_that_was_found_is_told(place, tiny_chain_folder, capsys):
    """Estimated, on the line of the mesh; told, or quiet, nothing of it."""
    from one2345pp import ElevationEstimator, One2345PlusPlusPipeline

    pipe = One2345PlusPlusPipeline.from_pretrained(tiny_chain_folder)
    pipe.elevation_estimator = ElevationEstimator(image_size=16, block_out_channels=(8,), norm_num_groups=4)
    pipe.save_pretrained("chain")
    command = f"generate mug.png -o a.glb --no-refine --model chain {FAST}"
    status, out, err = run(command, capsys)
    assert status == 0 and err == ""
    assert re.fullmatch(
        r"a\.glb  [\d.]+ s, seen from about -?\d+ degrees above the horizon \(--elevation tells it\)\n", out
    )
    assert "degrees" not in run(f"{command} --elevation 10", capsys)[1]
    assert run(f"{command} --quiet", capsys)[1:] == ("", "")


def test_the_library_log_reaches_the_screen_unless_quiet(place, capsys, monkeypatch):
    """What the package logs is a line on stderr; a quiet command tells errors alone, and nothing stays of it afterwards."""
    log = logging.getLogger("one2345pp.somewhere")

    def info(args):
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            log.log(level, "level %d", level)
        return 0

    monkeypatch.setattr(commands, "info", info)
    assert run("info", capsys)[2].splitlines() == [f"one2345pp: level {level}" for level in (20, 30, 40)]
    assert run("info --quiet", capsys)[2] == "one2345pp: level 40\n"
    log.info("afterwards")
    assert capsys.readouterr().err == ""


class Narrow:
    """A terminal that knows ASCII alone, or is closed."""

    def __init__(self, error: Exception | None = None):
        self.text, self.error = "", error

    def write(self, text: str) -> None:
        if self.error is not None:
            raise self.error
        self.text += text.encode("ascii").decode()

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError("no file")


def test_telling_never_stops_the_work(place, tiny_chain_folder, monkeypatch):
    """Names that the terminal cannot show, a terminal that is closed, full or not there: meshes are written, and the status tells."""
    for name in ("漢字", "ok", "\udcff"):
        shutil.copy("mug.png", f"{name}.png")
    command = ["generate", "漢字.png", "bad.png", "\udcff.png", "ok.png", "-o", "out", "--no-refine", *FAST.split()]
    command += ["--model", str(tiny_chain_folder)]
    for stream in (
        Narrow(),
        Narrow(BrokenPipeError()),
        Narrow(OSError(28, "full")),
        Narrow(ValueError("closed")),
        None,
    ):
        shutil.rmtree("out", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            assert cli.main(command) == 2
        assert len(list((place / "out").glob("*.glb"))) == 3
        if stream is not None and stream.error is None:
            assert r"out/\u6f22\u5b57.glb" in stream.text and "bad.png: cannot be read" in stream.text


def test_interrupted_commands_say_so(place, capsys, monkeypatch):
    """Ctrl-C ends with the status that shells give it, and one line."""

    def info(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "info", info)
    assert run("info", capsys) == (130, "", "one2345pp: interrupted\n")


# --- another first stage ----------------------------------------------------------------------------------------------


def test_another_first_stage_by_option(place, tiny_chain_folder, tiny_multiview, capsys):
    """`--multiview FOLDER` draws the views, all else is the model's: the mesh is that of the chain put together in Python."""
    with torch.no_grad():
        tiny_multiview.unet.conv_out.weight.add_(0.1)
    tiny_multiview.save_pretrained("first")
    command = (
        f"generate mug.png -o a.glb --multiview first --model {tiny_chain_folder} {FAST} --save-intermediates parts"
    )
    assert run(command, capsys)[0] == 0
    from one2345pp import MultiViewTilePipeline, One2345PlusPlusPipeline

    pipe = One2345PlusPlusPipeline.from_pretrained(tiny_chain_folder)
    pipe = pipe.with_stages(multiview=MultiViewTilePipeline.from_pretrained("first"))
    pipe.set_progress_bar_config(disable=True)
    out = pipe("mug.png", num_inference_steps=1, num_occupancy_steps=2, num_sparse_steps=1, num_texture_steps=2,
               texture_size=64, max_faces=400, generator=torch.Generator().manual_seed(0))  # fmt: skip
    for number, view in enumerate(out.views[0]):
        assert np.array_equal(np.asarray(Image.open(place / "parts" / "views" / f"{number:03d}.png")), np.asarray(view))
    assert np.allclose(load_mesh(place / "a.glb").bounds, out.meshes[0].bounds, atol=1e-6)
    for model, words in (
        ("nothing", "--multiview nothing: is neither a folder nor a Hub id"),
        ("views", "no model_index.json"),
    ):
        status, _, err = run(f"generate mug.png -o a.glb --multiview {model} --model {tiny_chain_folder}", capsys)
        assert status == 2 and words in err


HUB = """
import contextlib, io, os, sys
os.environ["HF_HUB_CACHE"] = sys.argv[1]
from one2345pp.cli import main
with contextlib.redirect_stderr(io.StringIO()) as told:
    status = main(sys.argv[2:])
sys.stdout.write(f"{status}\\n{told.getvalue()}")
"""


@pytest.mark.parametrize("name", ["zero123plus-v1.2", "sudo-ai/zero123plus-v1.1"])
def test_public_first_stages_by_name(place, tiny_chain_folder, tiny_multiview, fresh_python, name):
    """A folder as the Hub's cache has it, offline, in a fresh process: its views are drawn, and its licence is told once."""
    hub = name.split("/")[-1]
    tiny_multiview.save_pretrained(place / "hub" / f"models--sudo-ai--{hub}" / "snapshots" / "abc")
    (place / "hub" / f"models--sudo-ai--{hub}" / "refs").mkdir()
    (place / "hub" / f"models--sudo-ai--{hub}" / "refs" / "main").write_text("abc")
    command = ["generate", place / "mug.png", "-o", place / "a.glb", "--multiview", name, "--model", tiny_chain_folder]
    status, *lines = fresh_python(HUB, place / "hub", *command, *FAST.split()).splitlines()[-3:]
    assert (place / "a.glb").exists() and "0" in (status, *lines)
    told = [line for line in lines if "CC-BY-NC 4.0" in line]
    assert told == [f"one2345pp: sudo-ai/{hub}: weights under CC-BY-NC 4.0, for uses that are not commercial."]


def test_options_of_the_first_stage_reach_it(place, tiny_chain_folder, capsys, monkeypatch):
    """Scheduler and LoRA weights by option are those of the chain that draws; what cannot be used is refused in one line."""
    pytest.importorskip("peft")
    from test_multiview_lora import adapt, save

    from one2345pp import One2345PlusPlusPipeline

    save(adapt(One2345PlusPlusPipeline.from_pretrained(tiny_chain_folder).multiview, ["unet"]), "lora")
    seen = []
    call = One2345PlusPlusPipeline.__call__

    def watched(self, *args, **kwargs):
        seen.append((type(self.scheduler).__name__, dict(self.get_list_adapters()), self.unet.active_adapters()))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(One2345PlusPlusPipeline, "__call__", watched)
    command = f"generate mug.png -o a.glb --model {tiny_chain_folder} {FAST}"
    assert run(f"{command} --scheduler UniPCMultistepScheduler --lora lora:0.5 --lora lora", capsys)[0] == 0
    (scheduler, adapters, active) = seen[0]
    assert scheduler == "UniPCMultistepScheduler" and adapters == {"unet": ["lora0", "lora1"]} == {"unet": active}
    for option, words in (
        ("--scheduler NoScheduler", "--scheduler NoScheduler: diffusers has none of that name"),
        ("--scheduler UNet2DModel", "--scheduler UNet2DModel: diffusers has none of that name"),
        ("--scheduler FlowMatchEulerDiscreteScheduler", "diffusers has none of that name"),
        ("--scheduler SchedulerMixin", "diffusers has none of that name"),
        ("--lora nowhere", "--lora nowhere: is neither a file nor a folder, nor a Hub id"),
        ("--offload model --device cpu", "--offload: moves models to a GPU and back, and there is none"),
    ):
        status, _, err = run(f"{command} {option}", capsys)
        assert status == 2 and words in err and err.count("\n") == 1
