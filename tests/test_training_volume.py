"""Data preparation and training of the volume networks: what is learned from, that it learns, that a cut run goes on."""

import copy
import json

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from training_config import COMPONENTS

from one2345pp import CameraRig, MultiViewTilePipeline
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.prepare import RIGS, prepare
from one2345pp.errors import InputError
from one2345pp.models.condition_encoder import ConditionEncoder
from one2345pp.models.unet_occupancy import OccupancyUNet3DModel
from one2345pp.models.view_batch import ViewBatch
from one2345pp.training import occupancy, sparse
from one2345pp.training.components import build_components
from one2345pp.training.drawn_views import DrawnViewsDataset
from one2345pp.training.views import SampleBatch, ViewSettings


CONDITION = {"channels": [4, 20], "image_size": 16, "stem_channels": [24], "patch_channels": 0, "hidden_channels": 6}
UNET = {"block_out_channels": [8, 12], "condition_channels": [4, 20], "norm_num_groups": 4}
CONFIG = {
    "occupancy": {
        "unet": UNET | {"sample_size": 8, "attention_levels": [], "dropout": 0.0},
        "condition": CONDITION | {"resolution": 8},
        "training": {"batch_size": 2, "max_steps": 4, "lr": 1e-3},
    },
    "sparse": {
        "unet": UNET | {"sample_size": 16, "pixel_channels": 5},
        "condition": CONDITION | {"resolution": 16},
        "training": {"batch_size": 2, "max_steps": 4, "lr": 1e-3},
    },
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two objects with a front, two azimuth frames each: 16^3 volumes, 16 px views."""
    folder = tmp_path_factory.mktemp("meshes")
    for name, nose in (("box", trimesh.creation.box((0.2, 0.2, 0.5))), ("ball", trimesh.creation.icosphere(2, 0.25))):
        mesh = trimesh.util.concatenate([trimesh.creation.box((0.6, 0.5, 0.3)), nose.apply_translation([0, 0, 0.3])])
        red_front = np.where(mesh.triangles_center[:, 2:] > 0.2, [[255, 0, 0, 255]], [[0, 0, 255, 255]]).astype(
            np.uint8
        )
        mesh.visual = trimesh.visual.ColorVisuals(mesh, face_colors=red_front)
        mesh.export(folder / f"{name}.ply")
    (folder / "table.csv").write_text("name,tier\nbox,scan\nball,lowpoly\n")
    output = tmp_path_factory.mktemp("prepared")
    (folder / "broken.ply").write_bytes(b"no mesh")
    meshes = [folder / f"{name}.ply" for name in ("box", "ball", "broken")]
    problems = prepare(meshes, output, frames=2, view_size=16, resolution=16, workers=1, table=folder / "table.csv")
    assert [problem.split(":")[0] for problem in problems] == ["broken", "broken"]
    return PreparedDataset(output)


def test_prepared_samples_hold_what_the_docs_say(dataset):
    assert len(dataset) == 4
    assert dataset.weights.tolist() == [1.0, 4.0, 1.0, 4.0]
    item = dataset[0]
    assert item["views"].shape == (12, 16, 16, 4)
    assert item["inputs"].shape == (2, 16, 16, 4)
    assert item["sdf"].shape == (16, 16, 16)
    assert item["sdf"].dtype == torch.int8
    assert len(item["coords"]) == len(item["colors"])


def test_volume_and_views_of_a_frame_share_its_world(dataset):
    """Oracle: where a view's centre pixel is opaque, walking along its ray meets the inside of the volume, in every frame."""
    for item in (dataset[index] for index in range(len(dataset))):
        rig = CameraRig.cat([CameraRig.named(name) for name in RIGS])
        origins, directions = rig.rays(17)
        inside = item["sdf"] < 0
        for view in range(12):
            steps = torch.linspace(0, 2.5, 400)[:, None]
            points = origins[view, 8, 8] + steps * directions[view, 8, 8]
            cells = ((points + 0.5) * 16).floor().long()
            hit = ((cells >= 0) & (cells < 16)).all(1)
            assert inside[tuple(cells[hit].T)].any(), "all our views look at the solid centre"
            assert item["views"][view, 8, 8, 3] == 255


def test_shell_occupancy_is_the_coarse_cells_near_the_surface():
    sdf = torch.ones(1, 4, 4, 4)
    sdf[0, 3, 0, 1] = 0.3
    assert occupancy.shell_occupancy(sdf, 0.4).nonzero().tolist() == [[0, 1, 0, 0]]
    assert not occupancy.shell_occupancy(sdf, 0.2).any()


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A folder of a tiny first stage with random weights, of 24 px views."""
    components = build_components(COMPONENTS, view_size=24, seed=0)
    folder = tmp_path_factory.mktemp("multiview")
    MultiViewTilePipeline(**components, view_size=24).save_pretrained(folder)
    return folder


def test_drawn_views_are_those_of_the_first_stage_and_are_drawn_once(dataset, first_stage, tmp_path):
    """Oracle: the files keep their times in a second run; a batch that must use them shows them, through the cameras of the drawn rig,
    beside the input picture that they were drawn from."""
    options = {"multiview": first_stage, "folder": tmp_path / "drawn", "count": 2, "steps": 1}
    drawn = DrawnViewsDataset(dataset, **options)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "drawn").iterdir()}
    assert len(files) == 2
    drawn = DrawnViewsDataset(dataset, **options)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "drawn").iterdir()} == files
    items = [drawn[index] for index in range(len(drawn))]
    assert sum("drawn" in item for item in items) == 2
    item = next(item for item in items if "drawn" in item)
    batch = SampleBatch([item], ViewSettings().still(drawn=True), 24, (), torch.Generator().manual_seed(0))
    rig = CameraRig.named("zero123plus-v1.2")
    shown = ViewBatch.from_pictures([[Image.fromarray(view.numpy()) for view in item["drawn"]]], [rig], 24)
    for name, value in vars(shown).items():
        assert name == "patches" or torch.equal(getattr(batch.views, name), value), name
    assert np.array_equal(batch.inputs[0], item["inputs"][int(item["drawn_input"])])
    true = SampleBatch([item], ViewSettings().still(), 24, (), torch.Generator().manual_seed(0))
    assert not torch.allclose(true.views.images, shown.images)


def test_drawn_views_have_figures_of_their_own_and_only_beside_validation(dataset, first_stage, tmp_path):
    config = copy.deepcopy(CONFIG["occupancy"])
    config["unet"] |= {"global_channels": COMPONENTS["vision_encoder"]["projection_dim"]}
    config["objective"] = {"multiview": str(first_stage), "drawn_samples": 4, "drawn_steps": 1}
    config["views"] = {**config.get("views", {}), "drawn": 1.0}
    occupancy.run(config, data=dataset.path, output=tmp_path, device="cpu", validation=dataset.path)
    figures = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[-1])
    assert {"shell_iou", "shell_iou_drawn"} <= set(figures)


def test_a_run_with_drawn_views_and_first_weights(dataset, first_stage, tmp_path):
    """Oracle: with no steps at all, a run that starts from another's weights saves those weights; one without draws no views."""
    vision = {"global_channels": COMPONENTS["vision_encoder"]["projection_dim"]}
    config = copy.deepcopy(CONFIG["occupancy"])
    config["unet"] |= vision
    config["objective"] = {"multiview": str(first_stage), "drawn_samples": 2, "drawn_steps": 1}
    occupancy.run(config, data=dataset.path, output=tmp_path / "first", device="cpu")
    assert len(list((tmp_path / "first" / "drawn").iterdir())) == 2
    config["objective"] = {"initial": str(tmp_path / "first")}
    config["training"] |= {"max_steps": 0, "seed": 5}
    occupancy.run(config, data=dataset.path, output=tmp_path / "second", device="cpu")
    assert not (tmp_path / "second" / "drawn").exists()
    weights = [OccupancyUNet3DModel.from_pretrained(tmp_path / run / "occupancy_unet") for run in ("first", "second")]
    for first, second in zip(*(model.parameters() for model in weights), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("stage", ["occupancy", "sparse"])
def test_training_learns_and_a_cut_run_goes_on(stage, dataset, tmp_path):
    """Two runs of two steps give the weights of one run of four; what they save loads."""
    module, config = {"occupancy": occupancy, "sparse": sparse}[stage], CONFIG[stage]
    constant = {**config, "training": config["training"] | {"lr_schedule": "constant", "warmup_steps": 1}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    module.run(constant, data=dataset.path, output=whole, device="cpu", validation=dataset.path)
    for steps in (2, 4):
        cut = {**constant, "training": constant["training"] | {"max_steps": steps}}
        module.run(cut, data=dataset.path, output=parts, device="cpu")
    states = [torch.load(folder / "state.pt", weights_only=True)["modules"] for folder in (whole, parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    figures = [json.loads(line) for line in (whole / "validation.jsonl").read_text().splitlines()]
    assert figures[-1]["step"] == 4
    assert list(whole.glob("preview-*.png"))
    encoder = ConditionEncoder.from_pretrained(whole / f"{stage}_condition")
    assert encoder.config.sparse == (stage == "sparse")
    if stage == "occupancy":
        assert OccupancyUNet3DModel.from_pretrained(whole / "occupancy_unet").config.sample_size == 8


def test_compiled_training_is_the_same_training(dataset, tmp_path):
    """Oracle: the weights after three steps. On a GPU it is another backend that compiles the same graphs."""
    states = []
    for backend in (None, "aot_eager"):
        config = CONFIG["occupancy"] | {
            "training": CONFIG["occupancy"]["training"] | {"max_steps": 3, "compile": backend}
        }
        occupancy.run(config, data=dataset.path, output=tmp_path / str(backend), device="cpu")
        states.append(torch.load(tmp_path / str(backend) / "state.pt", weights_only=True)["modules"])
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("stage", ["occupancy", "sparse"])
def test_training_runs_in_bfloat16(stage, dataset, tmp_path):
    """The number format of a GPU run: weights stay float32 and finite."""
    module, config = {"occupancy": occupancy, "sparse": sparse}[stage], CONFIG[stage]
    settings = config["training"] | {"mixed_precision": "bf16"}
    module.run({**config, "training": settings}, data=dataset.path, output=tmp_path, device="cpu")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["modules"]
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in state.values())


def test_a_seed_decides_the_first_weights():
    """Oracle: equal seeds, equal weights; the global generator is neither read nor moved."""
    weights = []
    for seed in (0, 4, 4):
        torch.manual_seed(len(weights))
        training = CONFIG["sparse"]["training"] | {"seed": seed}
        objective = sparse.SparseObjective(CONFIG["sparse"] | {"training": training}, 3.2)
        assert torch.initial_seed() == len(weights)
        weights.append(objective.modules["condition"].shared.weight)
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("stage", ["occupancy", "sparse"])
def test_loss_falls_on_one_batch(stage, dataset):
    module, config = {"occupancy": occupancy, "sparse": sparse}[stage], CONFIG[stage]
    kind = {"occupancy": "OccupancyObjective", "sparse": "SparseObjective"}[stage]
    cells = dataset.truncation * dataset.meta["resolution"]
    objective = getattr(module, kind)(config, cells)
    batch = objective.collate([dataset[0], dataset[1]], torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(objective.modules.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss, _ = objective.loss(batch, torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_support_noise_changes_the_support_and_none_gives_the_children(dataset):
    objective = sparse.SparseObjective(CONFIG["sparse"], dataset.truncation * dataset.meta["resolution"])
    sample = objective.samples([dataset[0]], ViewSettings().still(), torch.Generator().manual_seed(0))
    clean = objective.batch(sample, 0.0, torch.Generator().manual_seed(0))["grid"]
    occupied = occupancy.shell_occupancy(sample.sdf, objective.threshold)
    assert len(clean) == 8 * occupied.sum()
    assert len(objective.batch(sample, 0.5, torch.Generator().manual_seed(0))["grid"]) != len(clean)


def test_first_step_is_where_sampling_starts(dataset):
    """Oracle: t is 999 always, never but by chance, or in about the asked share of draws; losses of both networks see it."""
    for stage, module in (("occupancy", occupancy.OccupancyObjective), ("sparse", sparse.SparseObjective)):
        for share in (0.0, 0.5, 1.0):
            objective = module(CONFIG[stage] | {"objective": {"first_step": share}}, 3.2)
            drawn = objective.timesteps(2000, torch.Generator().manual_seed(0), "cpu")
            assert abs((drawn == 999).float().mean() - share) < 0.05
            assert drawn.min() >= 0 and drawn.max() <= 999
        seen = []
        objective.modules["unet"].register_forward_pre_hook(lambda module, args: seen.extend(args[1].tolist()))  # noqa: B023
        batch = objective.collate([dataset[0], dataset[1]], torch.Generator().manual_seed(0))
        objective.loss(batch, torch.Generator().manual_seed(0))
        assert set(seen) == {999}


def test_distance_losses(dataset, monkeypatch):
    """Oracle: a prediction off by a half everywhere costs 1/2 in distance with l1 and 1/4 with l2; colours stay squared."""
    costs = {}
    for name in ("l1", "l2"):
        objective = sparse.SparseObjective(CONFIG["sparse"] | {"objective": {"distance_loss": name}}, 3.2)
        monkeypatch.setattr(objective, "predict", lambda noisy, steps, batch, *_: batch["target"] - 0.5)
        batch = objective.collate([dataset[0], dataset[1]], torch.Generator().manual_seed(0))
        costs[name] = objective.loss(batch, torch.Generator().manual_seed(0))[1]
    assert costs["l1"] == pytest.approx({"sdf": 0.5, "color": 0.25}, abs=1e-5)
    assert costs["l2"] == pytest.approx({"sdf": 0.25, "color": 0.25}, abs=1e-5)


def test_missing_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="prepare"):
        PreparedDataset(tmp_path)
