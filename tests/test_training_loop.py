"""The loop itself, on a network of two layers: that a seed fixes a run, that a cut one goes on exactly, that nothing half is left."""

from pathlib import Path

import pytest
import torch
from torch import nn

from one2345pp.errors import InputError
from one2345pp.training.loop import LoopSettings, share_minutes, train


SETTINGS = {"batch_size": 2, "lr": 1e-2, "lr_schedule": "constant", "warmup_steps": 1, "ema_decay": 0.0}


class Copying:
    """Learns to give back a vector, with dropout or without; `break_save`: saving fails half way."""

    def __init__(self, dropout: float = 0.0, break_save: bool = False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.modules = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8), nn.Dropout(dropout), nn.Linear(8, 8))})
        self.break_save = break_save

    def collate(self, items, generator):
        return {"x": torch.stack(items) + torch.randn(len(items), 8, generator=generator)}

    def loss(self, batch, generator):
        return (self.modules["net"](batch["x"]) - batch["x"]).square().mean(), {}

    def preview(self, modules, path):
        pass

    def save(self, modules, output):
        for name in "ab":
            (output / name).mkdir(exist_ok=True)
            torch.save(modules.state_dict(), output / name / "weights.bin")
            if self.break_save:
                (output / name / "weights.bin").write_bytes(b"half")
                raise OSError("no space left")


def weights(output: Path, dropout: float, *steps: int, seed: int = 0) -> torch.Tensor:
    """Of a run that was cut at each of `steps`, and began with whatever the global generator held."""
    torch.seed()
    for most in steps:
        objective = Copying(dropout)
        train(objective, torch.eye(8), LoopSettings(**SETTINGS, max_steps=most, seed=seed), output, device="cpu")
    return torch.cat([parameter.detach().flatten() for parameter in objective.modules.parameters()])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_seed_fixes_a_run_and_a_cut_one_goes_on_exactly(dropout, tmp_path):
    """Oracle: six steps, six once more, three and three, to the last bit. Another seed, or no dropout, is another run."""
    whole = weights(tmp_path / "whole", dropout, 6)
    assert torch.equal(whole, weights(tmp_path / "again", dropout, 6))
    assert torch.equal(whole, weights(tmp_path / "parts", dropout, 3, 6))
    assert not torch.equal(whole, weights(tmp_path / "seed", dropout, 6, seed=1))
    assert torch.equal(whole, weights(tmp_path / "without", 0.0, 6)) == (dropout == 0)


def test_dropout_is_another_one_each_step(tmp_path):
    """Oracle: the masks of four steps, which a seed that forgot the step would make equal."""
    objective, masks = Copying(0.5), []
    objective.modules["net"][1].register_forward_hook(lambda layer, args, out: masks.append(out == 0))
    train(objective, torch.eye(8), LoopSettings(**SETTINGS, max_steps=4), tmp_path, device="cpu")
    assert len(masks) == 4 and not any(torch.equal(masks[0], mask) for mask in masks[1:])


def test_a_cut_save_leaves_the_files_before(tmp_path):
    """Oracle: the files of the save before, to the bit, after one that fails half way; the next one replaces them, and what else lies
    beside them, such as a model card, stays."""
    weights(tmp_path, 0.0, 1)
    (tmp_path / "a" / "README.md").write_text("a card")
    before = {file: file.read_bytes() for file in tmp_path.glob("[ab]/*")}
    assert len(before) == 3
    with pytest.raises(OSError, match="no space"):
        train(Copying(break_save=True), torch.eye(8), LoopSettings(**SETTINGS, max_steps=2), tmp_path, device="cpu")
    assert {file: file.read_bytes() for file in tmp_path.glob("[ab]/*")} == before
    weights(tmp_path, 0.0, 3)
    after = {file: file.read_bytes() for file in tmp_path.glob("[ab]/*")}
    assert after.keys() == before.keys()
    assert {file.name for file in before if after[file] == before[file]} == {"README.md"}
    assert not list(tmp_path.glob("*.part"))


def test_minutes_are_shared_out_or_refused():
    """Oracle: sums and ratios; a phase without a limit is named."""
    phases = {"vae": LoopSettings(minutes=10), "unet": LoopSettings(minutes=30)}
    assert share_minutes(phases, None) == {"vae": 10, "unet": 30}
    assert share_minutes(phases, 4) == {"vae": 1, "unet": 3}
    assert share_minutes({"vae": LoopSettings()}, None) == {"vae": None}
    with pytest.raises(InputError, match="needs minutes of its own, and vision has none"):
        share_minutes(phases | {"vision": LoopSettings()}, 4)
