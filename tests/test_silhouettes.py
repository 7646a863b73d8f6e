"""Silhouettes as limits of a volume, on shapes whose views are exact: a ball, and views of it that do not agree."""

import numpy as np
import pytest
import torch
import trimesh
from conftest import volume_components
from PIL import Image

from one2345pp import CameraRig, SparseVolumeDiffusionPipeline
from one2345pp.geometry.render import render
from one2345pp.geometry.silhouettes import AGREEMENT, agreement, carve, hull_distance
from one2345pp.geometry.volume import SparseVolume, cell_centers
from one2345pp.pipelines.volume_inputs import carve_masks


RIG = CameraRig.named("zero123plus-v1.2")


@pytest.fixture(scope="module")
def views():
    """Six views of a ball of radius 0.3."""
    return [Image.fromarray(view) for view in render(trimesh.creation.icosphere(4, 0.3), RIG, 96)]


@pytest.fixture(scope="module")
def masks(views):
    return [np.asarray(view.getchannel("A"), np.float32) / 255 for view in views]


def test_distance_to_the_hull_of_a_ball(masks):
    """Oracle: a sphere from a distance d shows a cone of half-angle asin(r / d), so at the origin the outline of each view is
    d tan(asin(r / d)) away; the hull holds the ball, and points in front of the silhouettes' planes are outside by as much as
    they stand off."""
    distance = RIG.positions.norm(dim=1)[0].item()
    edge = distance * np.tan(np.arcsin(0.3 / distance))
    up = torch.tensor([[0.0, 0.0, 0.0]])
    assert hull_distance(masks, RIG, up).item() == pytest.approx(-edge, abs=0.012)  # a pixel: the middle falls between four
    on_ball = (
        torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1) * 0.3
    )
    found = hull_distance(masks, RIG, on_ball)
    assert found.max() < 0.006, "half a pixel: the hull holds the object"
    assert found.median() > -0.05
    assert (hull_distance(masks, RIG, on_ball * 1.4) > 0.05).float().mean() > 0.9


def test_nothing_is_known_beyond_the_pictures(masks):
    """A camera that looks past the point says nothing about it."""
    away = CameraRig.from_angles([0.0], 0.0, 0.1, 1.87)
    assert hull_distance(masks[:1], away, torch.tensor([[0.4, 0.0, 0.0]])).item() == -torch.inf


def test_true_views_agree_and_others_do_not(masks):
    assert agreement(masks, RIG) > AGREEMENT
    shifted = [*masks[:5], np.roll(masks[5], 20, 1)]
    assert agreement(shifted, RIG) < 0.95
    assert agreement([np.zeros((96, 96), np.float32)] * 6, RIG) == 0


def test_carving_takes_what_lies_outside_and_leaves_the_rest(masks):
    """Oracle: a volume that is solid everywhere keeps a ball, within the hull's own excess; one that is right already is kept."""
    axis = torch.arange(32)
    coords = torch.cartesian_prod(axis, axis, axis)
    solid = SparseVolume(coords, torch.full((len(coords),), -0.1), torch.zeros(len(coords), 3), 32, 0.1)
    carved = carve(solid, masks, RIG, margin=0.0)
    radius = cell_centers(coords, 32).norm(dim=1)
    assert (carved.sdf[radius < 0.29] < 0).all()
    assert (carved.sdf[radius > 0.45] > 0).all()
    assert solid.sdf.max() < 0, "the volume that came in is as it was"
    right = SparseVolume(coords, (radius - 0.3).clamp(-0.1, 0.1), solid.colors, 32, 0.1)
    assert (carve(right, masks, RIG, margin=0.01).sdf - right.sdf).abs().max() < 1e-6


def test_by_default_only_given_silhouettes_that_agree_carve(views):
    """Views on a background, keyed masks and views that do not agree leave the volume alone, unless it is asked for."""
    flat = [Image.alpha_composite(Image.new("RGBA", view.size, "white"), view).convert("RGB") for view in views]
    swapped = [
        views[0],
        *[view.transform(view.size, Image.Transform.AFFINE, (1, 0, 25, 0, 1, 0)) for view in views[1:]],
    ]
    assert carve_masks(views, RIG, None) is not None
    assert carve_masks(views, RIG, False) is None
    assert carve_masks(flat, RIG, None) is None
    assert carve_masks(swapped, RIG, None) is None
    assert len(carve_masks(flat, RIG, True)) == 6


def test_the_pipeline_carves_what_it_drew(views):
    """Oracle: with random weights the volume reaches beyond the ball's silhouettes; carved, no voxel outside them is inside."""
    pipe = SparseVolumeDiffusionPipeline(
        **volume_components(), truncation=0.1, default_num_occupancy_steps=2, default_num_sparse_steps=2
    )
    pipe.set_progress_bar_config(disable=True)

    def volume(**kwargs):
        return pipe(views, output_type="volume", generator=torch.Generator().manual_seed(0), **kwargs).volumes[0]

    whole, carved = volume(carve=False), volume()
    outside = hull_distance([np.asarray(v.getchannel("A")) / 255 for v in views], RIG, whole.centers) > 0.25 / 16
    assert (whole.sdf[outside] < 0).any()
    assert (carved.sdf[outside] >= 0).all()
    assert torch.equal(whole.coords, carved.coords)
