"""Reports on folders of small meshes: pairing, frames, alignment, files."""

import json

import numpy as np
import pytest
import trimesh

from one2345pp.errors import InputError
from one2345pp.evaluation.report import Settings, evaluate, evaluate_pair
from one2345pp.geometry.mesh import normalize_to_sphere


FAST = {"points": 4_000, "views": 3, "image_size": 48}


def shape(seed: int) -> trimesh.Trimesh:
    """Three coloured boxes, no symmetry, far from the world's frame."""
    rng = np.random.default_rng(seed)
    parts = [
        trimesh.creation.box(rng.uniform(0.3, 1, 3)).apply_translation(rng.uniform(-0.4, 0.4, 3)) for _ in range(3)
    ]
    mesh = trimesh.util.concatenate(parts)
    mesh.visual.face_colors = np.append(rng.integers(0, 255, 3), 255).astype(np.uint8)
    return mesh.apply_scale(7).apply_translation((3, 4, 5))


@pytest.fixture
def folders(tmp_path):
    """Truths a, b, c; predictions a (perfect), b (smaller, shifted and turned by 90 degrees) and stray."""
    pred, gt = tmp_path / "pred", tmp_path / "gt"
    pred.mkdir()
    gt.mkdir()
    for seed, name in enumerate("abc"):
        shape(seed).export(gt / f"{name}.glb")
    normalize_to_sphere(shape(0)).export(pred / "a.ply")
    turned = normalize_to_sphere(shape(1)).apply_scale(0.8).apply_translation((0.9, 0, 0.5))
    turned.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, (0, 1, 0))).export(pred / "b.obj")
    shape(0).export(pred / "stray.stl")
    return pred, gt


def test_report_measures_pairs_and_lists_the_others(folders, tmp_path):
    """Oracles: a perfect prediction scores 1 in the package's frame; a moved one does once aligned."""
    groups = tmp_path / "index.csv"
    groups.write_text("name,tier\na,scan\nb,lowpoly\n")
    report = evaluate(*folders, tmp_path / "out", groups=groups, **FAST)
    a, b = report["objects"]["a"], report["objects"]["b"]
    assert a["none"]["f_score@0.05"] > 0.99 and a["none"]["mask_iou"] > 0.98 and a["none"]["psnr"] > 30
    assert b["none"]["f_score@0.05"] < 0.7
    assert b["yaw-icp"]["f_score@0.05"] > 0.99 and b["yaw-icp"]["mask_iou"] > 0.9
    assert report["counts"] == {"truths": 3, "predictions": 3, "pairs": 2, "measured": 2}
    assert report["missing_predictions"] == ["c"] and report["missing_truths"] == ["stray"]
    mean = report["summary"]["none"]["mean"]["f_score@0.05"]
    assert mean == pytest.approx((a["none"]["f_score@0.05"] + b["none"]["f_score@0.05"]) / 2, abs=1e-6)
    assert report["groups"]["none"]["scan"] == {"objects": 1} | a["none"]


def test_report_files_are_readable_and_the_same_every_time(folders, tmp_path):
    """Proves that JSON and Markdown are written, name the settings and definitions, and do not change from run to run."""
    settings = FAST | {"alignments": ("none",)}
    report = evaluate(*folders, tmp_path / "one.json", **settings)
    evaluate(*folders, tmp_path / "two", **settings)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two" / "report.json").read_bytes()
    written = json.loads((tmp_path / "one.json").read_text())
    assert written["settings"]["points"] == 4_000 and "chamfer_l2_mean" in written["definitions"]
    text = (tmp_path / "one.md").read_text()
    assert text.strip() == report["text"].strip()
    assert "2 of 3 true meshes measured" in text and "- c" in text and "- seed: 0" in text


def test_two_workers_give_the_same_report(folders):
    """Proves that the order and the numbers do not depend on the number of processes."""
    settings = FAST | {"views": 0, "alignments": ("none",)}
    assert evaluate(*folders, workers=2, **settings) == evaluate(*folders, **settings)


def test_a_bad_file_does_not_stop_the_others(folders):
    """Proves that a broken mesh is listed with its reason, and the callback hears of every pair."""
    pred, gt = folders
    (pred / "b.obj").write_text("not a mesh")
    heard = []
    report = evaluate(
        pred,
        gt,
        callback_on_object_end=lambda *args: heard.append(args),
        **FAST | {"views": 0, "alignments": ("none",)},
    )
    assert list(report["objects"]) == ["a"] and list(report["failed"]) == ["b"]
    assert "b.obj" in report["failed"]["b"] and "Not measured" in report["text"]
    assert heard == [(1, 2, "a"), (2, 2, "b")]


def test_truth_is_normalised_only_when_asked():
    """Oracle: a truth far from the origin meets its own copy in the same place only without normalisation."""
    mesh = shape(0)
    settings = {"points": 4_000, "views": 0, "alignments": ("none",)}
    same = evaluate_pair(mesh, mesh, Settings(**settings, normalize_gt=False))["none"]
    assert same["f_score@0.05"] > 0.99 and same["chamfer_l2_mean"] > 0.003  # sampling noise: the two draws differ
    assert evaluate_pair(mesh, mesh, Settings(**settings))["none"]["f_score@0.05"] == 0.0


def test_distances_are_in_longest_sides_of_the_truth():
    """Oracle: a sphere of diameter 1 against one 4 % wider is 0.02 away, whatever the size of the world."""
    truth, pred = (trimesh.creation.icosphere(4, radius=r) for r in (30.0, 31.2))
    settings = Settings(points=100_000, views=0, alignments=("none",), normalize_gt=False)
    assert evaluate_pair(pred, truth, settings)["none"]["chamfer_l2_mean"] == pytest.approx(0.02, rel=0.05)


def test_evaluate_says_what_is_wrong(folders, tmp_path):
    """Proves the messages for missing folders, doubled names, nothing to pair, unknown alignments, bad CSV."""
    pred, gt = folders
    with pytest.raises(InputError, match="no such folder"):
        evaluate(tmp_path / "nowhere", gt)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="none of its 0 meshes"):
        evaluate(tmp_path / "empty", gt)
    with pytest.raises(InputError, match="expected some of none, yaw-icp"):
        evaluate(pred, gt, alignments=("icp",))
    (tmp_path / "bad.csv").write_text("object,kind\na,b\n")
    with pytest.raises(InputError, match="columns name and tier"):
        evaluate(pred, gt, groups=tmp_path / "bad.csv")
    shape(0).export(pred / "a.stl")
    with pytest.raises(InputError, match="Keep one file a name"):
        evaluate(pred, gt)
