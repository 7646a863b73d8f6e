"""`convert assemble`: the outputs of the trainings become one folder that loads and computes the same."""

import json

import pytest
import torch
from conftest import volume_components

from one2345pp import ElevationEstimator, One2345PlusPlusPipeline
from one2345pp.cli import main


@pytest.fixture
def trainings(tiny_multiview, tmp_path):
    """Folders as the trainings leave them."""
    tiny_multiview.save_pretrained(tmp_path / "multiview")
    components = volume_components()
    for stage in ("occupancy", "sparse"):
        for part in ("unet", "condition"):
            components[f"{stage}_{part}"].save_pretrained(tmp_path / stage / f"{stage}_{part}")
    components["elevation_estimator"] = ElevationEstimator(image_size=16, block_out_channels=(8,))
    components["elevation_estimator"].save_pretrained(tmp_path / "elevation" / "elevation_estimator")
    return tmp_path, components


def test_assembled_folder_has_every_part(trainings):
    folder, components = trainings
    (folder / "card.md").write_text("# a card\n")
    (folder / "stages.json").write_text(
        json.dumps(
            {
                "volume": {"default_num_sparse_steps": 3},
                "drawn_volume": {"surface_level": 0.2},
                "candidates": 4,
                "tell_kinds": True,
                "believe_picture": True,
            }
        )
    )
    command = ["convert", "assemble", "-o", str(folder / "out"), "--card", str(folder / "card.md"), "--quiet"]
    command += ["--config", str(folder / "stages.json")]
    for stage in ("multiview", "occupancy", "sparse", "elevation"):
        command += [f"--{stage}", str(folder / stage)]
    assert main(command) == 0
    pipe = One2345PlusPlusPipeline.from_pretrained(folder / "out")
    assert (folder / "out" / "README.md").read_text() == "# a card\n"
    assert pipe.volume.config.default_num_sparse_steps == 3
    assert pipe.config.default_num_candidates == 4
    assert pipe.config.tell_kinds and pipe.config.believe_picture
    assert pipe.drawn_volume.config.surface_level == 0.2
    assert pipe.volume.config.truncation == pytest.approx(3.2 / 16)
    for name in ("occupancy_unet", "sparse_condition", "elevation_estimator"):
        for saved, loaded in zip(components[name].parameters(), getattr(pipe, name).parameters(), strict=True):
            assert torch.equal(saved.half().float(), loaded), "half on disk, float in memory"


def test_missing_training_is_refused(trainings, capsys):
    folder, _ = trainings
    command = ["convert", "assemble", "-o", str(folder / "out"), "--multiview", str(folder / "multiview")]
    command += ["--occupancy", str(folder / "none"), "--sparse", str(folder / "sparse")]
    assert main(command) == 2
    assert "none" in capsys.readouterr().err
    assert not (folder / "out").exists()
