"""Packed samples: what they keep exactly, what they lose and how much of it, and that a file is whole or absent."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from one2345pp.data import pack
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.maps import MAPS, Map
from one2345pp.data.prepare import make_frame, make_ring
from one2345pp.data.shapes import random_shape
from one2345pp.errors import InputError


@pytest.fixture(scope="module")
def frame() -> dict[str, np.ndarray]:
    mesh = random_shape(torch.Generator().manual_seed(5))
    return make_frame(mesh, 30.0, np.random.default_rng(0), view_size=48, resolution=32, maps=["normals"])


def test_what_is_kept_and_what_is_lost(frame, tmp_path):
    """Oracle: the sample before it was packed."""
    file = tmp_path / "shape.0.zip"
    pack.write_sample(file, frame)
    read = pack.read_sample(file)
    assert {key: (a.shape, a.dtype) for key, a in read.items()} == {key: (a.shape, a.dtype) for key, a in frame.items()}
    for key in ("normals", "colors"):
        np.testing.assert_array_equal(read[key], frame[key])
    for key in ("views", "inputs"):
        np.testing.assert_array_equal(read[key][..., 3], frame[key][..., 3])  # masks
        error = np.square(_on_grey(read[key]) - _on_grey(frame[key])).mean()
        assert 10 * np.log10(255**2 / error) > 34
    inside = np.abs(frame["sdf"].astype(int)) < 127
    assert np.array_equal(np.abs(read["sdf"].astype(int)) < 127, inside)  # the cells that have colours
    error, step = np.abs(read["sdf"].astype(float) - frame["sdf"]), 127 / pack.LEVELS
    near = np.abs(frame["sdf"].astype(int)) < 127 - step  # the last step of the band is wider, so that cells stay in it
    assert error[near].max() <= 0.5 * step + 0.5
    assert error.max() <= step


def test_maps_of_one_channel_keep_every_value(frame, tmp_path, monkeypatch):
    """Oracle: the array before it was packed, of a map that only this test knows."""
    monkeypatch.setitem(MAPS, "depth", Map(1, "normal"))
    depth = frame["normals"][..., 2:]
    pack.write_sample(tmp_path / "shape.0.zip", {"depth": depth})
    np.testing.assert_array_equal(pack.read_sample(tmp_path / "shape.0.zip")["depth"], depth)


def _on_grey(pictures: np.ndarray) -> np.ndarray:
    alpha = pictures[..., 3:] / 255
    return pictures[..., :3] * alpha + 127 * (1 - alpha)


def test_rings_keep_their_order(tmp_path):
    """Oracle: every picture is nearer to itself, packed, than to any other."""
    ring = make_ring(random_shape(torch.Generator().manual_seed(6)), 0.0, np.random.default_rng(0), view_size=32)
    pack.write_sample(tmp_path / "ring.0.zip", ring)
    packed = pack.read_sample(tmp_path / "ring.0.zip")
    assert {key: array.shape for key, array in packed.items()} == {key: array.shape for key, array in ring.items()}
    assert np.array_equal(packed["elevations"], ring["elevations"])
    for key in ("views", "inputs"):
        before, after = (_on_grey(a).reshape(12, -1) for a in (ring[key], packed[key]))
        distances = np.square(before[:, None] - after[None]).mean(-1)
        assert (distances.argmin(1) == np.arange(12)).all()


def test_a_failed_write_leaves_no_sample(tmp_path):
    with pytest.raises(TypeError):
        pack.write_sample(
            tmp_path / "a.0.zip", {"colors": np.zeros(3, np.uint8), "views": np.zeros((1, 4, 4, 9), np.uint8)}
        )
    assert not (tmp_path / "a.0.zip").exists()


def test_folders_of_another_format_say_how_to_mend_it(tmp_path: Path):
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "truncation": 0.05}))
    with pytest.raises(InputError, match="has format 1.*one2345pp prepare"):
        PreparedDataset(tmp_path)
