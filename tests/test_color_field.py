"""The colour field against its definition."""

import pytest
import torch

from one2345pp.models.color_field import ColorField


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def field():
    return ColorField(resolution=5, components=2, feature_channels=3, hidden=8).initialize(
        torch.Generator().manual_seed(0)
    )


def test_products_are_plane_times_line(field):
    """Oracle: at grid points products are plain array entries. No two planes are alike, so swapped axes cannot cancel."""
    planes, lines = field.planes.detach(), field.lines.detach()[..., 0]
    for i, j, k in [(0, 0, 0), (4, 0, 2), (1, 3, 4), (2, 4, 1)]:
        point = torch.tensor([[i, j, k]]) / 4 * 2 - 1
        expected = torch.cat(
            [
                planes[0, :, j, i] * lines[0, :, k],
                planes[1, :, k, i] * lines[1, :, j],
                planes[2, :, k, j] * lines[2, :, i],
            ]
        )
        torch.testing.assert_close(field._products(point.float())[0].detach(), expected)


def test_colors_are_in_range_and_depend_on_point_and_direction(field):
    points = torch.rand(10, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    directions = torch.nn.functional.normalize(points + 0.1, dim=-1)
    colors = field(points, directions)
    assert colors.shape == (10, 3) and ((colors > 0) & (colors < 1)).all()
    assert not torch.allclose(colors, field(points.flip(0), directions))
    assert not torch.allclose(colors, field(points, -directions))


def test_total_variation_is_that_of_the_definition(field):
    with torch.no_grad():
        field.planes.fill_(0.3)
        field.lines.fill_(-0.2)
        assert field.total_variation() == 0
        field.lines[:, :, ::2] += 1.0
        assert field.total_variation().item() == pytest.approx(1.0)


def test_the_generator_decides_every_weight(field):
    """Under another global seed all weights are equal; with another generator the grids differ."""
    torch.manual_seed(123)
    again = ColorField(5, 2, 3, 8).initialize(torch.Generator().manual_seed(0))
    for one, other in zip(field.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    other = ColorField(5, 2, 3, 8).initialize(torch.Generator().manual_seed(1))
    assert not torch.equal(other.planes, field.planes)
    assert field.planes.std().item() == pytest.approx(0.1, rel=0.2)


def test_saves_and_loads(field, tmp_path):
    field.save_pretrained(tmp_path)
    loaded = ColorField.from_pretrained(tmp_path)
    points, directions = torch.rand(4, 3) - 0.5, torch.eye(4, 3)
    assert torch.equal(loaded(points, directions), field(points, directions))


def test_it_learns_a_color_that_changes_across_space():
    """A field that could not represent position would stay at the mean, an error of 1/12 a channel."""
    generator = torch.Generator().manual_seed(0)
    field = ColorField(16, 4, 6, 16).initialize(generator)
    optimizer = torch.optim.Adam(field.parameters(), lr=0.02)
    for _ in range(150):
        points = torch.rand(512, 3, generator=generator) - 0.5
        loss = (field(points, points) - (points + 0.5)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.003
