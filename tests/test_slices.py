"""Cuts through a volume: where each cell lands, and what its distance and colour look like."""

import numpy as np
import pytest
import torch

from one2345pp.errors import InputError
from one2345pp.geometry.slices import render_slices
from one2345pp.geometry.volume import SparseVolume


def one_cell(x: int, y: int, z: int, sdf: float) -> SparseVolume:
    coords = torch.tensor([[x, y, z]])
    return SparseVolume(coords, torch.tensor([sdf]), torch.tensor([[1.0, 0.0, 0.0]]), 8, 0.1)


@pytest.mark.parametrize(
    ("axis", "row", "column"),
    [("z", 7 - 2, 1), ("x", 7 - 2, 7 - 3), ("y", 3, 1)],
)
def test_a_cell_lands_where_it_is_seen_from_the_positive_end(axis, row, column):
    """Oracle: cell (1, 2, 3) by hand; +X right and +Y up seen from +Z, +Z left seen from +X, +Z down seen from +Y."""
    sheet = np.asarray(render_slices(one_cell(1, 2, 3, 0.0), axis, count=1, size=8)).astype(int)
    distance, colors = sheet[:8], sheet[12:]
    assert sheet.shape == (20, 8, 3)
    found = np.argwhere((colors == [255, 0, 0]).all(-1))
    assert found.tolist() == [[row, column]]
    assert (distance[row, column] == 255).all() and (distance == 255).all(-1).sum() == 1


def test_inside_is_blue_and_outside_is_red():
    """Oracle: the sign of the distance decides which of red and blue is stronger; half the truncation is half the way from white."""
    inside, outside = (
        np.asarray(render_slices(one_cell(0, 7, 0, s), count=1, size=8))[0, 0].astype(int) for s in (-0.05, 0.05)
    )
    assert inside[2] > inside[0] and outside[0] > outside[2]
    assert np.abs(inside - (255 + np.array([0.16, 0.33, 0.66]) * 255) / 2).max() <= 1


def test_cuts_span_the_active_cells():
    """Oracle: two cells in the first and last layer; the first and last of three cuts show one each, the middle none."""
    coords = torch.tensor([[0, 0, 2], [0, 0, 6]])
    volume = SparseVolume(coords, torch.zeros(2), torch.tensor([[0.0, 1, 0]] * 2), 8, 0.1)
    sheet = np.asarray(render_slices(volume, count=3, size=8))[12:]
    shown = [(sheet[:, 12 * i : 12 * i + 8] == [0, 255, 0]).all(-1).any() for i in range(3)]
    assert shown == [True, False, True]


@pytest.mark.parametrize(("kwargs", "message"), [({"axis": "w"}, "'x', 'y' or 'z'"), ({"count": 0}, "at least 1")])
def test_unusable_arguments_are_named(kwargs, message):
    with pytest.raises(InputError, match=message):
        render_slices(one_cell(0, 0, 0, 0.0), **kwargs)


def test_nothing_to_draw_is_said():
    with pytest.raises(InputError, match="no active cells"):
        render_slices(SparseVolume(torch.zeros(0, 3).long(), torch.zeros(0), torch.zeros(0, 3), 8, 0.1))
