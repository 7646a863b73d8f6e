"""Views that the first stage draws for training: that a cut run goes on exactly, and that of several processes one draws."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_training_volume import CONFIG, dataset, first_stage  # noqa: F401  four frames of two objects
from training_config import COMPONENTS

from one2345pp.training import drawn_views
from one2345pp.training.drawn_views import DrawnViewsDataset


TWO_PROCESSES = """
import json, sys, torch
from accelerate import PartialState
from one2345pp.training import occupancy
from one2345pp.training.drawn_views import DrawnViewsDataset

torch.set_num_threads(1)
data, folder = sys.argv[1:]
drawn, draw = [], DrawnViewsDataset._draw
DrawnViewsDataset._draw = lambda self, pipe, indices, *args: drawn.extend(indices) or draw(self, pipe, indices, *args)
occupancy.run(json.load(open(folder + "/config.json")), data=data, output=folder + "/run", device="cpu", validation=data)
print(len(drawn), file=open(f"{folder}/{PartialState().process_index}.txt", "w"))
"""


def contents(folder) -> dict:
    return {file.name: {key: value.tolist() for key, value in np.load(file).items()} for file in folder.iterdir()}


def test_a_cut_run_draws_what_the_whole_one_draws(dataset, first_stage, tmp_path, monkeypatch):  # noqa: F811
    """Oracle: files of a whole run, of one that was cut between batches and in one, and of one that drew fewer samples at first."""
    monkeypatch.setattr(drawn_views, "BATCH", 2)

    def draw(name: str, count: int = 4) -> dict:
        DrawnViewsDataset(dataset, first_stage, tmp_path / name, count, steps=1)
        return contents(tmp_path / name)

    whole, own = draw("whole"), DrawnViewsDataset._draw
    assert len(whole) == 4 and len({str(sample["drawn"]) for sample in whole.values()}) == 4

    def cut(self, *args):
        if list(self.folder.iterdir()):
            raise KeyboardInterrupt
        own(self, *args)

    monkeypatch.setattr(DrawnViewsDataset, "_draw", cut)
    with pytest.raises(KeyboardInterrupt):
        draw("cut")
    monkeypatch.setattr(DrawnViewsDataset, "_draw", own)
    drawn = sorted((tmp_path / "cut").iterdir())
    assert len(drawn) == 2
    drawn[0].unlink()
    written = drawn[1].stat().st_mtime_ns
    assert draw("cut") == whole and drawn[1].stat().st_mtime_ns == written
    assert len(draw("fewer", 2)) == 2 and draw("fewer") == whole


@pytest.mark.slow
def test_of_two_processes_one_draws(dataset, first_stage, tmp_path):  # noqa: F811
    """Oracle: the samples that each process drew: all in the first, for training and validation, none in the second."""
    config = {**CONFIG["occupancy"], "objective": {"multiview": str(first_stage), "drawn_samples": 4, "drawn_steps": 1}}
    config["unet"] = config["unet"] | {"global_channels": COMPONENTS["vision_encoder"]["projection_dim"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = tmp_path / "program.py"
    program.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    done = subprocess.run(
        [*command, str(dataset.path), str(tmp_path)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["8\n", "0\n"]
    assert len(list((tmp_path / "run" / "drawn").glob("*.npz"))) == 4
