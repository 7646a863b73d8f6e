"""Condition encoder and occupancy UNet: oracles for the projection, pooling and equivalences. The sparse UNet has its own file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from one2345pp import CameraRig, ConditionEncoder, OccupancyUNet3DModel, SparseUNet3DModel
from one2345pp.geometry.cameras import project
from one2345pp.geometry.volume import cell_centers
from one2345pp.models.condition_encoder import patch_features, project_pixels
from one2345pp.models.sparse import SparseGrid
from one2345pp.models.view_batch import ViewBatch


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def batch():
    values = np.random.default_rng(0).integers(0, 256, (2, 6, 16, 16, 4), np.uint8)
    rigs = [CameraRig.named("zero123plus-v1.2"), CameraRig.named("zero123plus-v1.1")]
    return ViewBatch.from_pictures([[Image.fromarray(view) for view in views] for views in values], rigs, 16)


def encoder(**kwargs):
    torch.manual_seed(0)
    config = {"resolution": 8, "channels": (6, 10), "image_size": 16, "stem_channels": (8, 4), "patch_channels": 0}
    return ConditionEncoder(**config | {"hidden_channels": 12} | kwargs).eval()


def test_sampling_reads_where_the_camera_sees(batch):
    """Oracle: maps that hold their own pixel coordinates give back the projection."""
    axis = (torch.arange(64) + 0.5) / 32 - 1
    maps = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(6, -1, -1, -1)
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * 0.4 - 0.2
    uv, _ = project(points, CameraRig.named("zero123plus-v1.1"))
    assert torch.allclose(batch.sample(maps, points, 1), uv, atol=1e-5)


def test_half_precision_does_not_move_places(batch):
    """A pattern of one pixel, in bf16, which holds it exactly, is read where the camera sees it, not up to half a pixel beside."""
    maps = (torch.arange(256) % 2).float().expand(6, 1, 256, 256)
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(1)) * 0.4 - 0.2
    read = batch.sample(maps.bfloat16(), points, 1)
    assert read.dtype == torch.bfloat16
    assert (read.float() - batch.sample(maps, points, 1)).abs().max() < 1 / 256


def test_rows_may_come_in_any_order(batch):
    """A grid whose rows are not sorted by sample has the same condition and pixels at each voxel."""
    model = encoder(sparse=True)
    coords = (torch.rand(2, 8, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.7).nonzero()
    mixed = torch.randperm(len(coords), generator=torch.Generator().manual_seed(3))
    plain, shuffled = SparseGrid(coords, 8, 2), SparseGrid(coords[mixed], 8, 2)
    assert torch.allclose(model(batch, plain)[0][mixed], model(batch, shuffled)[0], atol=1e-6)
    for expected, got in zip(project_pixels(batch, plain), project_pixels(batch, shuffled), strict=True):
        assert torch.allclose(expected[mixed], got, atol=1e-6)


def test_points_behind_a_camera_and_outside_an_image_read_zero(batch):
    maps = torch.ones(6, 1, 4, 4)
    behind = CameraRig.named("zero123plus-v1.2").positions[:1] * 1.5
    assert (batch.sample(maps, behind, 0)[0] == 0).all()
    assert (batch.sample(maps, torch.tensor([[0.0, 5.0, 0.0]]), 0) == 0).all()


def test_order_of_views_makes_no_difference(batch):
    """Pooling over views is symmetric."""
    order = [3, 1, 5, 0, 2, 4]
    fields = ("images", "world_to_camera", "tan_half_fov", "half_width", "present")
    shuffled = ViewBatch(*(getattr(batch, name)[:, order] for name in fields))
    for pooling in ("max", "max_mean"):
        model = encoder(pooling=pooling)
        for a, b in zip(model(batch), model(shuffled), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_sparse_pyramid_equals_the_dense_one_where_all_is_active(batch):
    """The two forms share every weight but the layout of the cells; off the sphere the dense one is zero."""
    dense, sparse = encoder(), encoder(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    grid = SparseGrid(torch.ones(2, 8, 8, 8).nonzero(), 8, 2)
    inside = cell_centers(grid.coords[:, 1:], 8).norm(dim=1) < 0.5
    volume = dense(batch)[0]
    sample, x, y, z = grid.coords.unbind(1)
    assert torch.allclose(sparse(batch, grid)[0][inside], volume[sample, :, x, y, z][inside], atol=1e-5)


def test_absent_views_do_not_count(batch):
    model = encoder()
    batch.present[:, 2] = False
    expected = model(batch)[0]
    batch.images[:, 2] = 1.0
    assert torch.equal(model(batch)[0], expected)


def test_projected_pixels_show_the_views_colour_and_direction():
    rig = CameraRig.named("zero123plus-v1.2")
    views = ViewBatch.from_pictures([[Image.new("RGBA", (16, 16), (255, 51, 0, 255))] * 6], [rig], 16)
    grid = SparseGrid(torch.tensor([[0, 4, 4, 4], [0, 3, 4, 4]]), 8, 1)
    pixels = project_pixels(views, grid)
    assert torch.allclose(pixels.colors, torch.tensor([1.0, -0.6, -1.0]).expand(2, 6, 3), atol=1e-5)
    assert torch.allclose(pixels.valid, torch.ones(2, 6))
    toward = rig.positions - cell_centers(grid.coords[0, 1:], 8)
    assert torch.allclose(pixels.directions[0], torch.nn.functional.normalize(toward, dim=-1), atol=1e-5)


def unet(**kwargs):
    torch.manual_seed(0)
    config = {"sample_size": 8, "block_out_channels": (8, 16), "condition_channels": (4, 12), "global_channels": 6}
    model = OccupancyUNet3DModel(
        **config | {"attention_levels": (1,), "norm_num_groups": 4, "dropout": 0.0} | kwargs
    ).eval()
    with torch.no_grad():  # blocks start as identities; give every weight something to do
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def test_every_input_of_the_occupancy_unet_matters():
    model, x = unet(), torch.randn(2, 1, 8, 8, 8)
    condition = [torch.randn(2, 4, 8, 8, 8), torch.randn(2, 12, 4, 4, 4)]
    inputs = {
        "timestep": torch.tensor([10, 700]),
        "condition": condition,
        "global_vector": torch.randn(2, 6),
        "self_condition": x,
    }
    base = model(x, **inputs).sample
    assert base.shape == x.shape
    changes = {
        "timestep": torch.tensor([10, 701]),
        "condition": [condition[0], condition[1] + 1],
        "global_vector": inputs["global_vector"] + 1,
        "self_condition": None,
    }
    for name, value in changes.items():
        assert not torch.allclose(model(x, **inputs | {name: value}).sample, base, atol=1e-5), name


def test_no_condition_equals_zeros():
    model, x = unet(), torch.randn(1, 1, 8, 8, 8)
    zeros = [torch.zeros(1, 4, 8, 8, 8), torch.zeros(1, 12, 4, 4, 4)]
    assert torch.equal(model(x, 5).sample, model(x, 5, zeros).sample)


def test_gradient_checkpointing_changes_nothing():
    x = torch.randn(1, 1, 8, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        model = unet().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(x, 5).sample.square().mean().backward()
        gradients.append(model.conv_in.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize(
    "file", sorted(f for f in CONFIGS.iterdir() if f.stem.startswith(("occ", "sparse"))), ids=lambda file: file.stem
)
def test_configs_instantiate_and_fit_each_other(file):
    """The full size of the paper (64^3, then 128^3, DINOv2-B/14 features), one level more, and the small one are the same classes."""
    config = json.loads(file.read_text())
    with torch.device("meta"):
        model = (SparseUNet3DModel if file.stem.startswith("sparse") else OccupancyUNet3DModel)(**config["unet"])
        condition = ConditionEncoder(**config["condition"])
    assert tuple(condition.config.channels) == tuple(model.config.condition_channels)
    assert condition.config.resolution == model.config.sample_size
    if "full" in file.stem:
        sizes = {"occupancy-full": 64, "sparse-full": 128, "sparse-full-256": 256}
        assert model.config.sample_size == sizes[file.stem]
        assert condition.config.patch_channels == 768
        assert condition.config.image_size % 14 == 0


def test_patch_features_are_sampled_from_a_dinov2():
    """A DINOv2 of another size feeds the encoder through the pipeline's own method."""
    from conftest import volume_components
    from transformers import Dinov2Config, Dinov2Model

    from one2345pp import SparseVolumeDiffusionPipeline

    torch.manual_seed(0)
    dino = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    ).eval()
    pipe = SparseVolumeDiffusionPipeline(**volume_components(), patch_encoder=dino)
    images = torch.randn(2, 3, 4, 16, 16)
    patches = patch_features(pipe.patch_encoder, images)
    assert patches.shape == (2, 3, 16, 4, 4)
    tokens = dino(
        (((images[1, 2:, :3] + 1) / 2) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    ).last_hidden_state
    assert torch.allclose(patches[1, 2, :, 1, 3], tokens[0, 1 + 4 + 3], atol=1e-5)
    rig = CameraRig.from_angles([0, 90, 180], 10, 0.6, 1.8)
    model = encoder(patch_channels=16, stem_channels=())
    views = ViewBatch.from_pictures([[Image.new("RGBA", (16, 16))] * 3] * 2, [rig, rig], 16)
    views.patches = patches
    pyramid = model(views)
    assert pyramid[0].shape == (2, 6, 8, 8, 8)
    views.patches = patches.flip(1)
    assert not torch.equal(model(views)[0], pyramid[0])


def test_patch_features_are_for_encoders_that_take_them():
    """A patch encoder whose patches do not divide the views does not matter to encoders without patch channels."""
    from conftest import tiny_dinov2, volume_components

    from one2345pp import SparseVolumeDiffusionPipeline, Views

    parts = volume_components()
    parts["occupancy_condition"] = ConditionEncoder.from_config(parts["occupancy_condition"].config, image_size=20)
    pipe = SparseVolumeDiffusionPipeline(**parts, patch_encoder=tiny_dinov2())
    rig, view = CameraRig.from_angles([0, 90], 10, 0.6, 1.8), Image.new("RGBA", (20, 20))
    view.paste((200, 0, 0, 255), (4, 4, 16, 16))
    views = [view] * 2
    assert pipe.prepare_views([Views(views, rig)], pipe.occupancy_condition).patches is None
    assert len(pipe(views, cameras=rig, num_occupancy_steps=1, num_sparse_steps=1, output_type="volume").volumes) == 1
