"""Every script in benchmarks/ and examples/ runs on tiny inputs, and what it writes has a row an object and numbers in it.

Networks have random weights, so no figure says anything of quality.
"""

import argparse
import ast
import importlib
import json
import math
import multiprocessing.dummy
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from one2345pp import SparseVolume
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.prepare import prepare
from one2345pp.data.shapes import shape
from one2345pp.geometry.extract import volume_to_mesh


ROOT = Path(__file__).parents[1]
SCRIPTS = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = [path for path in SCRIPTS if path.stem != "harness"]
OBJECTS = {"mushroom": "lowpoly", "table": "scan"}
RIG = "zero123plus-v1.2"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_keeps_the_house_rules(path):
    """A smoke test in this file, a command in the docstring, `main(argv)`, and no import of another script."""
    assert f"test_{path.stem}" in globals(), f"{path.name} has no smoke test: write test_{path.stem}"
    tree = ast.parse(path.read_text())
    assert f"python {path.parent.name}/{path.name}" in ast.get_docstring(tree)
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [argument.arg for argument in main.args.args] == ["argv"] and len(main.args.defaults) == 1
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {other.stem for other in SCRIPTS}


# --- running them -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def import_path():
    """Scripts can be imported, and find the harness, as when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "examples"):
            patch.syspath_prepend(ROOT / folder)
        yield


def run(script: str, *argv) -> None:
    """Run a script here: a new process would take longer to import torch than most of them to work."""
    threads = torch.get_num_threads()
    try:
        importlib.import_module(script).main([str(argument) for argument in argv])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """`objects` and their `index.csv`, of which two are held out, `frames` and `rings` of those."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "objects").mkdir()
    for name in OBJECTS:
        shape(name).export(folder / "objects" / f"{name}.glb")
    rows = ["name,split,tier", "chair,train,lowpoly", *(f"{name},val,{tier}" for name, tier in OBJECTS.items())]
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    settings = {"frames": 1, "view_size": 16, "resolution": 16, "workers": 1, "table": folder / "index.csv"}
    prepare([folder / "objects"], folder / "frames", **settings)
    prepare([folder / "objects"], folder / "rings", **settings, rings=[RIG])
    return folder


@pytest.fixture(scope="module")
def meshes(inputs) -> list:
    """Arguments that say which objects."""
    return ["--objects", inputs / "objects", "--index", inputs / "index.csv", "--size", 32, "--threads", 1]


@pytest.fixture(scope="module")
def reconstructed(tmp_path_factory, tiny_chain_folder, meshes) -> Path:
    """Output of `reconstruct_val.py`, which `card_sheets.py` reads."""
    output = tmp_path_factory.mktemp("reconstructed")
    options = ["--limit", 1, "--points", 500, "--views", 2, "--elevation", "unknown"]
    run("reconstruct_val", *meshes, *options, "--model", tiny_chain_folder, "--output", output)
    return output


def quoted_commands() -> list[str]:
    """The commands of benchmarks that the docs show, in blocks (which may name their beginning `measure`) and in the text."""
    commands = []
    for path in [
        *sorted((ROOT / "docs").glob("*.md")),
        *(ROOT / name for name in ("README.md", "model_cards/README.md")),
    ]:
        text = path.read_text()
        measure = re.search(r'^measure="(.*)"$', text, flags=re.MULTILINE)
        expanded = text if measure is None else text.replace("$measure", measure[1])
        commands += re.findall(r"^python benchmarks/.*$", expanded, flags=re.MULTILINE)
        commands += re.findall(r"`(python benchmarks/[^`]+)`", text)
    return sorted({" ".join(command.split()) for command in commands})


@pytest.mark.parametrize("command", quoted_commands())
def test_commands_of_the_docs_parse(command, monkeypatch):
    """Every command that the docs show has arguments that its script takes."""

    class Parsed(Exception):
        pass

    def stop(parser, argv):
        parser.parse_args(argv)
        raise Parsed

    monkeypatch.setattr(importlib.import_module("harness"), "parse", stop)
    _, script, *arguments = shlex.split(command, comments=True)
    with pytest.raises(Parsed):
        run(Path(script).stem, *arguments)


# --- reading what they write ------------------------------------------------------------------------------------


def read_tables(path: Path) -> list[list[dict[str, str]]]:
    """The Markdown tables of a file, rows by their columns."""
    tables = []
    for block in path.read_text().split("\n\n"):
        lines = [line for line in block.strip().splitlines() if line.startswith("|")]
        if lines:
            heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            tables.append([dict(zip(heading, row, strict=True)) for row in rows])
    return tables


def numbers(row: dict[str, str], *labels: str) -> dict[str, float]:
    """The cells of a row but for its labels, each a finite number."""
    found = {name: float(cell) for name, cell in row.items() if name not in labels}
    assert found and all(map(math.isfinite, found.values())), row
    return found


def finite(figures) -> bool:
    """Whether all numbers in a report are, at any depth."""
    if isinstance(figures, dict | list):
        return all(map(finite, figures.values() if isinstance(figures, dict) else figures))
    return not isinstance(figures, float) or math.isfinite(figures)


def is_sheet(path: Path, rows: int, columns: int, size: int, gap: int = 4) -> bool:
    """Whether a picture is a sheet of so many pictures, and the last column of the last row shows something."""
    sheet = Image.open(path).convert("RGB")
    cell = size + gap
    last = np.asarray(sheet)[(rows - 1) * cell + gap :, (columns - 1) * cell + gap :]
    return sheet.size == (columns * cell + gap, rows * cell + gap) and last.std() > 1


# --- quality on held-out objects --------------------------------------------------------------------------------


def test_views_val(tmp_path, inputs, tiny_chain_folder):
    """Two drawings of two objects: means, tiers and seeds; the true tile comes back better than the input picture six times."""
    options = ["--model", tiny_chain_folder, "--steps", 1, "--seeds", 2, "--threads", 1]
    run("views_val", "--data", inputs / "rings", "--output", tmp_path, *options)
    views, seeds = read_tables(tmp_path / "views.md")
    assert [row["views"] for row in views] == [
        "autoencoder",
        "copy",
        "generated",
        "generated, lowpoly",
        "generated, scan",
    ]
    for row in views:
        found = numbers(row, "views")
        assert 0 <= found["mask_iou"] <= 1 and 0 <= found["hull_agreement"] <= 1
    assert [row["azimuth"] for row in seeds] == ["30", "90", "150", "210", "270", "330"]
    assert all(numbers(row) for row in seeds)
    report = json.loads((tmp_path / "views.json").read_text())
    assert report["settings"]["objects"] == 2 and finite(report)
    assert is_sheet(tmp_path / "views.png", 2, 1 + 6 + 6, 96)
    assert is_sheet(tmp_path / "seeds.png", 2 * 2, 1 + 6, 96)


def test_views_val_looks_at_the_first_frame_of_a_ring(inputs):
    """Oracle: the object itself, as the rig's cameras see it."""
    harness, views_val = importlib.import_module("harness"), importlib.import_module("views_val")
    rig = harness.CameraRig.named(RIG)
    for item, one in zip(
        views_val.examples(inputs / "rings", rig, 16, None),
        sorted(harness.held_out_objects(inputs / "objects", inputs / "index.csv"), key=lambda one: one.name),
        strict=True,
    ):
        truth = harness.true_views(one.load(), rig, 16)
        assert min(views_val.mask_iou(*pair) for pair in zip(item["truth"], truth, strict=True)) > 0.99
        assert min(views_val.psnr_on_grey(*pair) for pair in zip(item["truth"], truth, strict=True)) > 25
        assert item["input"].size == (16, 16)


@pytest.mark.parametrize("drawn", [False, True], ids=["true", "drawn"])
def test_volume_val(tmp_path, inputs, tiny_chain_folder, drawn):
    """A row for all objects and for each tier, of true and of drawn views."""
    options = ["--model", tiny_chain_folder, "--points", 500, "--threads", 1, *["--drawn"] * drawn]
    run("volume_val", "--data", inputs / "frames", "--output", tmp_path, *options)
    (table,) = read_tables(tmp_path / "volume.md")
    assert [(row["objects"], row["number"]) for row in table] == [("all", "2"), ("lowpoly", "1"), ("scan", "1")]
    for row in table:
        found = numbers(row, "objects")
        assert 0 < found["iou"] <= min(found["precision"], found["recall"]) + 1e-3
        assert 0 < found["distance"] < 2 and 0 <= found["f_true@0.05"] <= 1
    report = json.loads((tmp_path / "volume.json").read_text())
    assert [one["name"] for one in report["objects"]] == list(OBJECTS) and finite(report)


@pytest.fixture
def volume_case(inputs):
    """The script, an object of its data, its truncation distance, and arguments."""
    prepared = PreparedDataset(inputs / "frames")
    settings = {"occupancy_steps": None, "sparse_steps": None, "points": 2000, "seed": 0}
    arguments = argparse.Namespace(data=inputs, drawn=False, rig=RIG, **settings)
    return importlib.import_module("volume_val"), prepared[0], prepared.truncation, arguments


def test_volume_val_gives_the_sparse_network_the_true_support(volume_case, tiny_chain):
    """Oracle: with a box of cells as support it draws on their children, whatever the occupancy network says."""
    volume_val, item, _, args = volume_case
    support = torch.full((1, 1, 8, 8, 8), -1.0)
    support[0, 0, 2:5, 3:6, 3:5] = 1
    picture, views = volume_val.given(tiny_chain, item, args)
    (occupancy, sample), _ = volume_val.reconstruct(tiny_chain, views, picture, args, support)
    assert occupancy.shape == support.shape and sample.shape == (8 * 3 * 3 * 2, 4)
    assert torch.equal(volume_val.reconstruct(tiny_chain, views, picture, args, support)[0][1], sample)


def test_volume_val_measures_the_truth_as_perfect(volume_case, tiny_chain, monkeypatch):
    """Oracle: networks that draw the true volume are right in every column."""
    volume_val, item, truncation, args = volume_case
    sdf, coords = item["sdf"].float() / 127, item["coords"]
    colors = torch.zeros(*sdf.shape, 3).index_put(coords.unbind(1), item["colors"] / 255)
    cells = coords.unbind(1)
    mesh = volume_to_mesh(SparseVolume(coords, sdf[cells] * truncation, colors[cells], len(sdf), truncation))
    supports = []

    def draw_truth(pipe, views, picture, args, support=None):
        supports.append(support)
        shell = F.max_pool3d((sdf.abs() < 1.25 / 3.2).float()[None, None], 2)
        cells = pipe.volume.subdivide(shell * 2 - 1).coords[:, 1:].unbind(1)
        return [shell * 2 - 1, torch.cat([sdf[cells][:, None], colors[cells] * 2 - 1], 1)], mesh

    monkeypatch.setattr(volume_val, "reconstruct", draw_truth)
    row = volume_val.measure(tiny_chain, item, truncation, args)
    assert (row["iou"], row["precision"], row["recall"]) == (1, 1, 1) and row["distance"] < 1e-6 and row["color"] == 60
    assert all(row[f"{name}@{t}"] > 0.99 for name in ("f_true", "f_predicted") for t in (0.02, 0.05))
    assert supports[0] is None and supports[1].shape == (1, 1, 8, 8, 8)


def test_reconstruct_val(reconstructed):
    """Every method has a mesh, a row in each alignment, for all and for the tier, and a front; the sheet shows all of them."""
    methods = ["reconstruct", "generate", "hull", "silhouette"]
    table, fronts = read_tables(reconstructed / "report.md")
    assert [row["method"] for row in fronts] == methods
    groups = {(row["method"], row["alignment"], row["tier"]) for row in table}
    assert groups == {(m, a, t) for m in methods for a in ("none", "yaw-icp") for t in ("all", "lowpoly")}
    for row in table:
        assert numbers(row, "method", "alignment", "tier")["objects"] == 1
    hull = numbers(fronts[methods.index("hull")], "method")
    assert hull["as they stand"] > 0.8 and hull["in frame"] > 0.8  # needs no weights
    report = json.loads((reconstructed / "report.json").read_text())
    assert list(report) == methods and finite(report)
    assert (reconstructed / "gt" / "mushroom.glb").exists() and not (reconstructed / "gt" / "table.glb").exists()
    assert Image.open(reconstructed / "sheets" / "mushroom.png").size == (8 * 196 + 4, 7 * 196 + 4)
    assert Image.open(reconstructed / "generated_views" / "mushroom.png").size == (6 * 16, 16)


def test_card_sheets(tmp_path, reconstructed):
    """A row an object, whose mesh and truth are shown."""
    run("card_sheets", reconstructed, tmp_path)
    assert is_sheet(tmp_path / "val-reconstruct.png", 1, 3 + 4 + 4, 80, gap=2)
    assert is_sheet(tmp_path / "val-generate.png", 1, 1 + 3 + 4 + 4, 80, gap=2)


@pytest.mark.parametrize("source", [[], ["--drawn"], ["--exact"]], ids=["true", "drawn", "exact"])
def test_texture_val(tmp_path, meshes, tiny_chain_folder, source):
    """Means before and after refinement, and two sides of the truth, before and after in the sheet."""
    run("texture_val", *meshes, "--every", 2, "--model", tiny_chain_folder, "--output", tmp_path, *source)
    (table,) = read_tables(tmp_path / "texture.md")
    assert [row["mesh"] for row in table] == ["before refinement", "after refinement"]
    assert all(0 <= numbers(row, "mesh")["mask_iou"] <= 1 for row in table)
    report = json.loads((tmp_path / "texture.json").read_text())
    assert list(report) == ["mushroom"] and finite(report)
    assert is_sheet(tmp_path / "texture.png", 1, 2 * 3, 160)


def test_drawings(tmp_path, tiny_chain_folder, capsys):
    """Pictures that go in, and a row each: picture, cut-out, six views, four sides."""
    run("drawings", tmp_path, "--model", tiny_chain_folder, "--limit", 2, "--threads", 1)
    assert capsys.readouterr().out.split() == ["apple", "cup"]
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == {"apple", "cup"}
    assert is_sheet(tmp_path / "drawings.png", 2, 2 + 6 + 4, 112)


# --- time and memory --------------------------------------------------------------------------------------------


def test_multiview(tmp_path, tiny_chain_folder):
    """Each mode's time, of all and of each step; half of the guidance gives another tile."""
    options = ["--steps", 2, "--threads", 1, "--output", tmp_path / "report.json"]
    run("multiview", "--model", tiny_chain_folder, *options)
    report = json.loads((tmp_path / "report.json").read_text())
    whole, half = report["rows"]
    assert (whole["mode"], half["mode"]) == ("guided", "half guided") and finite(report)
    assert whole["share"] == 1 and whole["psnr"] is None and 0 < half["psnr"] < 60
    assert all(row["seconds"] > sum(row["step_seconds"]) > 0 and len(row["step_seconds"]) == 2 for row in (whole, half))


def test_multiview_with_random_weights(tmp_path):
    """The networks of a config of train multiview."""
    config, output = ROOT / "configs" / "multiview-small.json", tmp_path / "report.json"
    run("multiview", "--config", config, "--steps", 1, "--threads", 1, "--output", output)
    assert finite(json.loads(output.read_text())["rows"])


def test_multiview_size(tmp_path):
    """Oracle: a guided step has two branches, so twice the operations; offloading needs less memory than all weights at once."""
    config, output = ROOT / "configs" / "multiview-small.json", tmp_path / "report.json"
    run("multiview_size", "--config", config, "--reference-size", 48, "--output", output)
    report = json.loads(output.read_text())
    operations, memory = report["operations"], report["mebibytes"]
    assert operations["step, guided"] == pytest.approx(2 * operations["step, not guided"])
    assert 0 < operations["reference pass, guided"] < operations["tile pass, guided"]
    assert 0 < memory["peak with offload"] < memory["peak without"] and finite(report)
    assert all(memory[name]["tensors"] > 0 for name in ("unet", "vae, encoding", "vae, decoding"))


def test_sparse(tmp_path):
    """A row for each number of voxels and channels."""
    options = ["--voxels", 200, 400, "--channels", 4, 8, "--repeats", 1, "--threads", 1]
    run("sparse", *options, "--output", tmp_path / "report.json")
    (table,) = read_tables(tmp_path / "report.md")
    rows = [row | {"share": row["share"].rstrip("%")} for row in table]
    assert [row["channels"] for row in rows] == ["4", "8"] * 2
    assert all(numbers(row, "spconv", "spconv_all")["voxels"] > 100 for row in rows)
    assert finite(json.loads((tmp_path / "report.json").read_text()))


def test_texture(tmp_path):
    """The seconds of each step and of all; painting brings the mesh nearer to its views."""
    sizes = ["--faces", 2000, "--size", 64, "--texture-size", 128, "--steps", 40]
    run("texture", *sizes, "--threads", 1, "--output", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    steps = ["unwrap", "observe", "sample the prior", "fit", "bake"]
    assert list(report["seconds"]) == [*steps, "all", "of it ray casting"] and finite(report)
    assert report["seconds"]["all"] == pytest.approx(sum(report["seconds"][step] for step in steps), abs=0.01)
    assert report["faces"] <= 2000 and report["psnr"]["after"] > report["psnr"]["before"]


def test_volume_size(tmp_path, monkeypatch):
    """A row for each network and scale. Its processes are threads here: each would import torch anew."""
    contexts = multiprocessing.get_context
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda name=None: multiprocessing.dummy if name == "spawn" else contexts(name)
    )
    shared = {"block_out_channels": [8, 12], "condition_channels": [4, 12], "global_channels": 8, "norm_num_groups": 4}
    condition = {"channels": [4, 12], "image_size": 28, "stem_channels": [8], "patch_channels": 6, "hidden_channels": 5}
    occupancy, sparse, output = (tmp_path / f"{name}.json" for name in ("occupancy", "sparse", "report"))
    parts = {"attention_levels": []}, {"pixel_channels": 4}
    for path, own in zip((occupancy, sparse), parts, strict=True):
        path.write_text(json.dumps({"unet": {"sample_size": 8, **shared, **own}, "condition": condition}))
    run("volume_size", occupancy, sparse, "--scales", 1, 2, "--threads", 1, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["config"], row["side"]) for row in rows] == [
        ("occupancy", 8),
        ("occupancy", 16),
        ("sparse", 8),
        ("sparse", 16),
    ]
    assert [row["voxels"] for row in rows[:2]] == [8**3, 16**3] and rows[3]["voxels"] > rows[2]["voxels"] > 0
    assert all(row["parameters"] > 0 for row in rows) and finite(rows)


# --- pictures of the docs ---------------------------------------------------------------------------------------


def test_plot_curves(tmp_path):
    """A panel for each figure, of the curves in the docs; they are those of the picture in the docs."""
    run("plot_curves", "--output", tmp_path / "curves.png")
    drawn, shown = (
        Image.open(path).convert("RGB") for path in (tmp_path / "curves.png", ROOT / "docs/images/curves.png")
    )
    assert drawn.size == shown.size == (2 * 500, 3 * 320)
    assert np.abs(np.asarray(drawn, float) - np.asarray(shown)).mean() < 4


def test_make_examples(tmp_path):
    """Oracle: the picture in the repository."""
    run("make_examples", "--names", "mushroom", "--output", tmp_path)
    drawn, shown = (np.asarray(Image.open(f / "mushroom.png"), float) for f in (tmp_path, ROOT / "examples"))
    assert drawn.shape == (512, 512, 4) and np.abs(drawn - shown).mean() < 1


def test_make_sheet(tmp_path, tiny_chain_folder):
    """One row: the picture, three sides of its mesh, two views, three sides of the mesh made from six."""
    run("make_sheet", "--model", tiny_chain_folder, "--names", "mushroom", "--output", tmp_path / "sheet.png")
    assert is_sheet(tmp_path / "sheet.png", 1, 1 + 3 + 2 + 3, 128)


# --- the harness ------------------------------------------------------------------------------------------------


def test_figures_of_the_harness():
    """Worked by hand."""
    harness = importlib.import_module("harness")
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert harness.iou(a, b) == pytest.approx(1 / 3) and harness.iou(a & ~a, a & ~a) == 1
    assert harness.psnr(np.zeros(4), np.full(4, 0.1)) == pytest.approx(20) and harness.psnr(a, a) == 60
    found, truth = np.full((1, 1, 2, 4), 255, np.uint8), np.full((1, 1, 2, 4), 255, np.uint8)
    found[0, 0, 1], truth[0, 0, 0, :3] = 0, 0
    assert harness.psnr_inside(found, truth) == 0 and harness.psnr_inside(found * 0, truth) == 0
    assert harness.spread(range(10), 3) == [0, 3, 6] and harness.spread([1, 2], None) == [1, 2]
    assert (
        harness.table(["a", "b"], [["x", 0.12345], ["y", None]])
        == "| a | b |\n| --- | --- |\n| x | 0.123 |\n| y |  |\n"
    )


def test_nothing_to_measure_is_an_error(tmp_path, inputs):
    """An empty table, a table without held-out objects, objects that are missing: said in words, nothing is written."""
    harness = importlib.import_module("harness")
    with pytest.raises(harness.InputError, match="nothing was measured"):
        harness.table(["a"], [])
    with pytest.raises(harness.InputError, match="nothing to show"):
        harness.save_sheet([], tmp_path / "sheet.png", 16)
    (tmp_path / "index.csv").write_text("name,split,tier\nmug,train,scan\n")
    with pytest.raises(harness.InputError, match="no row has the split 'val'"):
        harness.held_out_objects(inputs / "objects", tmp_path / "index.csv")
    (tmp_path / "index.csv").write_text("name,split,tier\nmug,val,scan\n")
    with pytest.raises(harness.InputError, match="lacks 1 of the table's objects, such as mug.glb"):
        harness.held_out_objects(inputs / "objects", tmp_path / "index.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["index.csv"]
