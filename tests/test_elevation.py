"""From how high a picture looks: the estimator, what it learns from, and what the chain does with what it says."""

import json
import math

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from one2345pp import ElevationEstimator, InputError, One2345PlusPlusPipeline
from one2345pp.cli import main
from one2345pp.data import prepare as preparation
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.shapes import shape
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.mesh import normalize_to_sphere
from one2345pp.geometry.render import render
from one2345pp.training.elevation import ElevationObjective, labelled_pictures, to_size


SMALL = {"image_size": 16, "block_out_channels": [8, 16], "dropout": 0.0}


def plates(folder, count: int, seed: int) -> None:
    """Files of flat round plates, whose outlines say how high a picture looks at them."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        plate = trimesh.creation.cylinder(radius=1, height=rng.uniform(0.02, 0.1), sections=40)
        plate.apply_transform(trimesh.transformations.rotation_matrix(math.pi / 2, (1, 0, 0)))
        plate.visual.vertex_colors = rng.integers(60, 255, 3)
        folder.mkdir(exist_ok=True)
        plate.export(folder / f"plate{seed}{index}.ply")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Rings of plates to learn from, and rings of others."""
    root = tmp_path_factory.mktemp("plates")
    for seed, name in enumerate(("train", "val")):
        plates(root / name, 6 - 4 * seed, seed)
        files = sorted((root / name).glob("*.ply"))
        preparation.prepare(
            files, root / f"rings-{name}", frames=1, view_size=16, workers=1, rings=["zero123plus-v1.2"]
        )
    return root


# --- the estimator ---------------------------------------------------------------------------------------------------


def test_targets_average_to_the_elevation():
    """Oracle: the expectation, between bins and on them; each target lies on two neighbours at most."""
    estimator = ElevationEstimator(**SMALL)
    assert estimator.bins.tolist() == list(range(-15, 46, 5))
    elevations = torch.tensor([-15.0, -10.0, 3.2, 12.5, 45.0])
    targets = estimator.targets(elevations)
    assert torch.equal(estimator.targets(torch.tensor([60.0])), targets[-1:])
    assert torch.allclose(targets @ estimator.bins, elevations, atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(5)) and (targets > 0).sum(1).tolist() == [1, 1, 2, 2, 1]


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="image_size: got 24, expected a multiple of 16 for 2 levels"):
        ElevationEstimator(**SMALL | {"image_size": 24})


def test_colours_of_what_is_transparent_do_not_matter(tmp_path):
    estimator = ElevationEstimator(**SMALL).eval()
    picture = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    picture[:, 3] = picture[:, 3].round()
    other = torch.where(picture[:, 3:] == 0, 1 - picture, picture)
    other[:, 3] = picture[:, 3]
    found = estimator.estimate(picture)
    assert torch.allclose(found, (estimator(picture).softmax(1) * estimator.bins).sum(1), atol=1e-4)
    assert found.shape == (2,) and torch.allclose(found, estimator.estimate(other), atol=1e-4)
    estimator.save_pretrained(tmp_path)
    assert torch.equal(ElevationEstimator.from_pretrained(tmp_path).estimate(picture), found)


# --- what it learns from ---------------------------------------------------------------------------------------------


def test_samples_say_the_elevation_of_their_pictures(monkeypatch):
    """Oracle: the picture drawn again from the elevation that is stored, lens and light known."""
    monkeypatch.setattr(preparation, "INPUT_FOVS", (30.0, 30.0))
    house = normalize_to_sphere(shape("house"))
    ring = preparation.make_ring(house, 0.0, np.random.default_rng(1), 32)
    frame = preparation.make_frame(house, 0.0, np.random.default_rng(1), 32, 16)
    assert ring["elevations"].shape == (6, 2) and frame["elevations"].shape == (2,)
    pictures, elevations = labelled_pictures(
        {key: torch.from_numpy(value) for key, value in ring.items()} | {"name": ""}
    )
    assert pictures.shape == (12, 32, 32, 4) and elevations.min() >= -10 and elevations.max() <= 40
    fov = math.radians(30)
    for index in (0, 1, 10):
        camera = CameraRig.from_angles([60.0 * (index // 2)], elevations[index].item(), fov, 0.5 / math.sin(fov / 2))
        again = np.asarray(frame_object(Image.fromarray(render(house, camera, 40)[0]), 32))[..., 3] >= 128
        own = pictures[index, ..., 3].numpy() >= 128
        assert (again & own).sum() / (again | own).sum() > 0.93


def test_labels_survive_the_file(sets):
    item = PreparedDataset(sets / "rings-train")[0]
    assert item["elevations"].dtype == torch.uint8 and item["elevations"].shape == (6, 2)


def test_samples_without_elevations_are_refused():
    with pytest.raises(InputError, match="old: its sample says no elevations"):
        labelled_pictures({"name": "old", "inputs": torch.zeros(2, 8, 8, 4, dtype=torch.uint8)})


def test_augmentation_keeps_height_and_draws_from_its_generator(sets):
    """Oracle: with everything switched off, the pictures; else other ones, the same from the same generator, no taller than framed."""
    item = PreparedDataset(sets / "rings-train")[0]
    still = {"mirror": 0.0, "recolor": 0.0, "gain": 0.0, "zoom": 0.0, "shift": 0.0, "pictures": 12}
    objective = ElevationObjective({"estimator": SMALL, "objective": still})
    batch = objective.collate([item], torch.Generator().manual_seed(0))
    pictures, elevations = labelled_pictures(item)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch["elevations"], elevations[order])
    alpha = batch["pictures"][:, 3:]
    assert torch.allclose(alpha, to_size(pictures[order], 16)[:, 3:], atol=1e-4)
    assert torch.allclose(batch["pictures"] * alpha, to_size(pictures[order], 16) * alpha, atol=1e-2)
    lively = ElevationObjective({"estimator": SMALL, "objective": {"pictures": 12}})
    first, second = (lively.collate([item], torch.Generator().manual_seed(3))["pictures"] for _ in range(2))
    assert torch.equal(first, second) and (first - batch["pictures"]).abs().mean() > 0.02
    assert 0 <= first.min() and first.max() <= 1.001


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match="unknown keys"):
        ElevationObjective({"estimator": SMALL, "objective": {"piktures": 1}})


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_training_learns_from_how_high_plates_are_seen(sets, tmp_path, backend):
    """Oracle: on plates that it has not seen, less than half the error of somebody who says the median without looking; also compiled
    and in bfloat16, as on CUDA."""
    training = {"batch_size": 4, "lr": 1e-2, "warmup_steps": 5, "max_steps": 120, "ema_decay": 0.9}
    training |= {} if backend is None else {"compile": backend, "mixed_precision": "bf16"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"estimator": SMALL, "objective": {"pictures": 8}, "training": training}))
    command = ["train", "elevation", str(config), "--data", str(sets / "rings-train"), "-o", str(tmp_path / "run")]
    assert main([*command, "--validation", str(sets / "rings-val"), "--device", "cpu", "--quiet"]) == 0
    figures = json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[-1])
    assert figures["degrees"] < 0.5 * figures["degrees_of_the_median"]
    assert list((tmp_path / "run").glob("preview-*.png"))
    trained = ElevationEstimator.from_pretrained(tmp_path / "run" / "elevation_estimator")
    pictures, elevations = labelled_pictures(PreparedDataset(sets / "rings-val")[0])
    assert (trained.estimate(to_size(pictures, 16)) - elevations).abs().mean() < 8


# --- the chain -------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tiny_chain):
    """A chain with an estimator that believes the picture, as the package's does."""
    tiny_chain.guide = {"shapes_volume": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_chain.elevation_estimator = ElevationEstimator(**SMALL).eval()
    return tiny_chain


@pytest.fixture
def picture() -> Image.Image:
    camera = CameraRig.from_angles([0], 25, 0.7, 1.6)
    return Image.fromarray(render(shape("house"), camera, 64)[0])


def estimated(chain, picture: Image.Image) -> float:
    framed = np.array(frame_object(chain.prepare_image(picture), 16))
    pixels = torch.from_numpy(framed[None]).movedim(-1, 1)  # laid out as a batch is: another order rounds otherwise
    return chain.elevation_estimator.estimate(pixels.float() / 255).item()


def run(chain, picture, **kwargs) -> list[bytes]:
    out = chain(picture, refine=False, generator=torch.Generator().manual_seed(0), **kwargs)
    return [mesh.vertices.tobytes() for mesh in out.meshes]


def test_what_is_not_told_is_estimated(chain, picture, tmp_path):
    """Oracle: the mesh of a call that is told what the estimator says; told something else, another one; also from a saved chain."""
    degrees = estimated(chain, picture)
    found = run(chain, picture)
    assert found == run(chain, picture, elevation=degrees) == run(chain, picture, elevation=[None])
    out = chain(picture, refine=False, generator=torch.Generator().manual_seed(0))
    assert out.elevations == [degrees]
    assert found != run(chain, picture, elevation=degrees + 15)
    chain.save_pretrained(tmp_path)
    loaded = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert run(loaded, picture) == found
    chain.elevation_estimator = None
    assert run(chain, picture) != found


def test_each_picture_has_its_own_elevation(chain, picture):
    """Oracle: two pictures in one call, the elevation of one told, give the meshes of two calls with the same generator."""
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = chain([picture, mirrored], elevation=[30.0, None], refine=False, generator=generators)
    assert both.elevations == [30.0, estimated(chain, mirrored)]
    assert both.meshes[0].vertices.tobytes() == run(chain, picture, elevation=30.0)[0]
    alone = chain(mirrored, refine=False, generator=torch.Generator().manual_seed(1))
    assert both.meshes[1].vertices.tobytes() == alone.meshes[0].vertices.tobytes()
