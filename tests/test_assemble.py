"""`convert assemble`: the outputs of the trainings become one folder that loads and computes the same."""

import json
import re

import pytest
import torch
from conftest import volume_components, volume_encoder

from one2345pp import ElevationEstimator, GuideSettings, One2345PlusPlusPipeline
from one2345pp.cli import main


@pytest.fixture
def trainings(tiny_multiview, tmp_path):
    """Folders as the trainings leave them; `encoder` is the first stage that the volume networks were trained with, of another width
    than `multiview`, which draws."""
    tiny_multiview.save_pretrained(tmp_path / "multiview")
    tiny_multiview.register_modules(**volume_encoder())
    tiny_multiview.save_pretrained(tmp_path / "encoder")
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
                "guide": {"num_candidates": 4, "shapes_volume": True},
            }
        )
    )
    command = ["convert", "assemble", "-o", str(folder / "out"), "--card", str(folder / "card.md"), "--quiet"]
    command += ["--config", str(folder / "stages.json"), "--volume-encoder", str(folder / "encoder")]
    for stage in ("multiview", "occupancy", "sparse", "elevation"):
        command += [f"--{stage}", str(folder / stage)]
    assert main(command) == 0
    pipe = One2345PlusPlusPipeline.from_pretrained(folder / "out")
    assert (folder / "out" / "README.md").read_text() == "# a card\n"
    assert pipe.volume.config.default_num_sparse_steps == 3
    assert pipe.guide == GuideSettings(num_candidates=4, shapes_volume=True)
    assert pipe.vision_encoder.config.projection_dim == 12 and pipe.volume.vision_encoder.config.projection_dim == 18
    assert pipe.drawn_volume.config.surface_level == 0.2
    assert pipe.volume.config.truncation == pytest.approx(3.2 / 16)
    for name in ("occupancy_unet", "sparse_condition", "elevation_estimator"):
        for saved, loaded in zip(components[name].parameters(), getattr(pipe, name).parameters(), strict=True):
            assert torch.equal(saved.half().float(), loaded), "half on disk, float in memory"


@pytest.mark.parametrize(
    ("config", "encoder", "words"),
    [
        ({}, "multiview", "vision_encoder: makes vectors of 12 numbers, but occupancy_unet takes 18"),
        ({"candidates": 4}, "encoder", r"stages.json: got \['candidates'\], expected some of volume, drawn_volume"),
        ({"volume": {"level": 1}}, "encoder", r"volume: got \['level'\], expected some of default_guidance_scale"),
        ({"drawn_volume": {"level": 1}}, "encoder", r"drawn_volume_config: got \['level'\]"),
        ({"texture": {"size": 1}}, "encoder", r"texture: got \['size'\]"),
        ({"guide": {"trust": 1}}, "encoder", r"guide_config: got \['trust'\]"),
    ],
)
def test_what_does_not_fit_is_refused(trainings, capsys, config, encoder, words):
    """An image encoder of a width that the volume networks do not know, and settings by names that nobody has: one line, and no
    folder."""
    folder, _ = trainings
    (folder / "stages.json").write_text(json.dumps(config))
    command = ["convert", "assemble", "-o", str(folder / "out"), "--config", str(folder / "stages.json")]
    command += ["--volume-encoder", str(folder / encoder)]
    for stage in ("multiview", "occupancy", "sparse"):
        command += [f"--{stage}", str(folder / stage)]
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(words, line)
    assert not (folder / "out").exists() and not (folder / "out.part").exists()


def test_missing_training_is_refused(trainings, capsys):
    folder, _ = trainings
    command = ["convert", "assemble", "-o", str(folder / "out"), "--multiview", str(folder / "multiview")]
    command += ["--occupancy", str(folder / "none"), "--sparse", str(folder / "sparse")]
    assert main(command) == 2
    assert "none" in capsys.readouterr().err
    assert not (folder / "out").exists()
