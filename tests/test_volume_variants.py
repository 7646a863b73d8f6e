"""Stage 2 as its configs vary it: the ablations of the paper's Table 4, maps of the views, predicted supports, a third network."""

import copy

import numpy as np
import pytest
import torch
import trimesh
from conftest import tiny_dinov2, volume_components
from PIL import Image
from test_training_volume import CONFIG

from one2345pp import CameraRig, ConditionEncoder, SparseUNet3DModel, SparseVolumeDiffusionPipeline
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.prepare import RIGS, prepare
from one2345pp.errors import InputError
from one2345pp.models.view_batch import ViewBatch
from one2345pp.training import occupancy, sparse
from one2345pp.training.sparse import SparseObjective, subdivide
from one2345pp.training.views import SampleBatch, ViewSettings


RIG = CameraRig.named(RIGS[0])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """One red box with a nose, a front frame with normals."""
    folder = tmp_path_factory.mktemp("variants")
    nose = trimesh.creation.box((0.2, 0.2, 0.5)).apply_translation([0.1, 0, 0.3])
    mesh = trimesh.util.concatenate([trimesh.creation.box((0.6, 0.5, 0.3)), nose])
    mesh.visual.vertex_colors = [200, 90, 30, 255]
    mesh.export(folder / "box.ply")
    prepare([folder / "box.ply"], folder / "data", frames=1, view_size=16, resolution=16, workers=1, maps=["normals"])
    return PreparedDataset(folder / "data")


def encoder(**kwargs):
    torch.manual_seed(0)
    config = {"resolution": 8, "channels": (6,), "image_size": 16, "stem_channels": (8,), "patch_channels": 0}
    return ConditionEncoder(**config | {"hidden_channels": 12} | kwargs).eval()


def view_batch(seed: int, rig: CameraRig = RIG) -> ViewBatch:
    values = np.random.default_rng(seed).integers(0, 256, (6, 16, 16, 4), np.uint8)
    return ViewBatch.from_pictures([[Image.fromarray(value) for value in values]], [rig], 16)


# --- ablations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view_features", "sees_views", "sees_cameras"),
    [("local", True, True), ("global", True, False), ("none", False, False)],
)
def test_view_features_say_what_a_voxel_knows(view_features, sees_views, sees_cameras):
    """Proves rows a, b and c of Table 4 apart: what other pictures, and the same pictures from elsewhere, change."""
    model = encoder(view_features=view_features)
    with torch.no_grad():
        base, others, turned = (
            model(batch)[0] for batch in (view_batch(0), view_batch(1), view_batch(0, RIG.rotated(90)))
        )
    assert torch.equal(base, others) != sees_views
    assert torch.equal(base, turned) != sees_cameras


ABLATIONS = {  # row of Table 4: what its config changes
    "a: no views": {"condition": {"view_features": "none"}, "unet": {"pixel_channels": 0}},
    "b: global views": {"condition": {"view_features": "global"}},
    "c: no global vector": {"objective": {"multiview": None}, "unet": {"global_channels": 0}},
    "e: no perturbation": {"views": {"perturb": 0.0}},
    "normals": {"condition": {"maps": {"normals": 3}}},
    "predicted support": {"objective": {"predicted_support": 1.0}},
    "patches": {"condition": {"patch_channels": 8}},
}


@pytest.mark.parametrize(
    ("stage", "name"),
    [("occupancy", name) for name in ABLATIONS if name != "predicted support"]
    + [("sparse", name) for name in ABLATIONS],
)
def test_every_ablation_trains(stage, name, dataset, tmp_path):
    """Two steps by the training's own loop, weights saved and different from those it began with. Row d, drawn views, has
    a test in test_training_volume."""
    module, config = {"occupancy": occupancy, "sparse": sparse}[stage], copy.deepcopy(CONFIG[stage])
    for key, change in ABLATIONS[name].items():
        change = {k: v for k, v in change.items() if stage == "sparse" or k != "pixel_channels"}
        config[key] = config.get(key, {}) | change
    if name == "predicted support":
        occupancy.run(CONFIG["occupancy"], data=dataset.path, output=tmp_path / "occupancy", device="cpu")
        config["objective"]["occupancy"] = str(tmp_path / "occupancy")
    if name == "patches":
        config["objective"] = {"patch_encoder": str(tmp_path / "dino")}
        tiny_dinov2().save_pretrained(tmp_path / "dino")
    for steps in (0, 2):
        config["training"] = config["training"] | {"max_steps": steps}
        module.run(config, data=dataset.path, output=tmp_path / str(steps), device="cpu", validation=dataset.path)
    before, after = (torch.load(tmp_path / str(steps) / "state.pt", weights_only=True)["modules"] for steps in (0, 2))
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(before["condition.project.weight"], after["condition.project.weight"])


# --- maps -----------------------------------------------------------------------------------------------------------


def test_maps_are_asked_for_where_they_are_taken_and_refused_elsewhere(views):
    components = volume_components()
    plain = quiet_pipe(components)
    with pytest.raises(InputError, match="take none"):
        plain(views, maps={"normals": views})
    torch.manual_seed(0)
    config = components["sparse_condition"].config
    components["sparse_condition"] = ConditionEncoder.from_config(config, maps={"normals": 3})
    pipe = quiet_pipe(components)
    with pytest.raises(InputError, match=r"maps: got \[\], but these condition encoders take normals"):
        pipe(views)
    with pytest.raises(InputError, match="expected one a view"):
        pipe(views, maps={"normals": views[:5]})
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    towards, across = ([Image.new("RGB", (24, 24), color)] * 6 for color in ((128, 128, 255), (255, 128, 128)))
    first = pipe(views, maps={"normals": towards}, output_type="volume", generator=seeded[0]).volumes[0]
    second = pipe(views, maps={"normals": across}, output_type="volume", generator=seeded[1]).volumes[0]
    assert torch.equal(first.coords, second.coords)
    assert not torch.equal(first.sdf, second.sdf)


# --- the support that an occupancy network predicts ------------------------------------------------------------------


def test_predicted_support_is_what_the_network_sees_above_the_level(dataset, tmp_path):
    """Oracle: the saved network's own prediction of the same views and noise, cut at the level; targets are the true ones there."""
    occupancy.run(CONFIG["occupancy"], data=dataset.path, output=tmp_path, device="cpu")
    config = CONFIG["sparse"] | {"objective": {"predicted_support": 1.0, "occupancy": str(tmp_path)}}
    objective = SparseObjective(config, dataset.truncation * dataset.meta["resolution"])
    sample = objective.samples([dataset[0]], ViewSettings().still(), torch.Generator().manual_seed(0))
    predicted = objective.occupancy(sample, draws_after_wobble(sample))
    level = predicted.median()
    batch = objective.batch(sample, 0.0, torch.Generator().manual_seed(1), level[None])
    assert torch.equal(batch["grid"].coords, subdivide(predicted > level).coords)
    _, x, y, z = batch["grid"].coords.T
    assert torch.equal(batch["target"][:, 0], sample.sdf[0, x, y, z])
    nothing = objective.batch(sample, 0.0, torch.Generator().manual_seed(1), torch.tensor([9.0]))["grid"]
    true = subdivide(occupancy.shell_occupancy(sample.sdf, objective.threshold))
    assert torch.equal(nothing.coords, true.coords), "where nothing is predicted the true support is taken"


def draws_after_wobble(sample: SampleBatch) -> torch.Generator:
    """The generator as `batch` hands it to the network: after the draws for the true support's noise."""
    generator = torch.Generator().manual_seed(1)
    torch.rand(sample.sdf.shape, generator=generator)
    return generator


# --- a third network, and too many voxels ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def views():
    pictures = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 4), np.uint8)
    pictures[..., 3] = 0
    pictures[:, 6:18, 6:18, 3] = 255
    return [Image.fromarray(picture) for picture in pictures]


def quiet_pipe(components: dict, **kwargs) -> SparseVolumeDiffusionPipeline:
    steps = {"default_num_occupancy_steps": 2, "default_num_sparse_steps": 2}
    pipe = SparseVolumeDiffusionPipeline(**components, truncation=0.1, **steps, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fine_components() -> dict:
    components = volume_components()
    torch.manual_seed(1)
    config = components["sparse_condition"].config
    components["fine_condition"] = ConditionEncoder.from_config(config, resolution=32, image_size=24)
    components["fine_unet"] = SparseUNet3DModel.from_config(components["sparse_unet"].config, sample_size=32)
    with torch.no_grad():
        components["sparse_unet"].proj_out.bias[0] += 0.5  # fewer voxels are as deep inside as can be
    return components


def test_a_third_network_subdivides_what_is_near_the_surface(views, tmp_path):
    """Oracle: the volume of the first two networks, whose voxels below `fine_level` have the third's voxels as children."""
    components = fine_components()
    two = {name: component for name, component in components.items() if not name.startswith("fine")}
    coarse = quiet_pipe(two)(views, output_type="volume", generator=torch.Generator().manual_seed(0)).volumes[0]
    level = coarse.sdf.abs().median().item()
    pipe = quiet_pipe(components, fine_level=level / coarse.truncation)
    shapes = []

    def callback(pipeline, step, timestep, tensors):
        shapes.append(tuple(tensors["latents"].shape))
        return {}

    fine = pipe(
        views, output_type="volume", generator=torch.Generator().manual_seed(0), callback_on_step_end=callback
    ).volumes[0]
    assert (fine.resolution, fine.truncation) == (32, 0.05)
    near = coarse.coords[coarse.sdf.abs() < level]
    assert 0 < len(near) < len(coarse.coords)
    assert torch.equal(torch.unique(fine.coords // 2, dim=0), torch.unique(near, dim=0))
    assert [len(shape) for shape in shapes] == [5, 5, 2, 2, 2, 2]
    assert shapes[-1][0] == 8 * len(near)
    pipe.save_pretrained(tmp_path)
    loaded = SparseVolumeDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(views, output_type="volume", generator=torch.Generator().manual_seed(0)).volumes[0]
    assert torch.equal(again.sdf, fine.sdf)


def test_too_many_voxels_are_refused_with_the_setting_to_change(views):
    with pytest.raises(InputError, match=r"active voxels at 16\^3, more than max_voxels, 100. Raise max_voxels"):
        quiet_pipe(volume_components(), max_voxels=100)(views, generator=torch.Generator().manual_seed(0))


def test_surface_level_moves_the_surface(views):
    """Oracle: the same distances, less the level, within the truncation; colours stay."""
    calls = {"output_type": "volume", "generator": torch.Generator().manual_seed(0)}
    plain = quiet_pipe(volume_components())(views, **calls).volumes[0]
    calls["generator"].manual_seed(0)
    thick = quiet_pipe(volume_components(), surface_level=0.1)(views, **calls).volumes[0]
    expected = (plain.sdf - 0.1 * plain.truncation).clamp(-plain.truncation, plain.truncation)
    torch.testing.assert_close(thick.sdf, expected)
    assert thick.sdf.sum() < plain.sdf.sum()
    assert torch.equal(thick.colors, plain.colors)
