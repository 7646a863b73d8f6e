"""Configs of trainings: those in the repository are read, and a key that no section knows is refused, wherever it stands."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from test_elevation import SMALL
from test_training_volume import CONFIG as VOLUMES
from training_config import COMPONENTS

from one2345pp import InputError
from one2345pp.training import elevation, finetune, multiview, occupancy, sparse
from one2345pp.training.components import check_components
from one2345pp.training.config import read
from one2345pp.training.denoiser import pipeline_settings
from one2345pp.training.volume_objective import VolumeObjective


CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
TRAININGS = [file for file in CONFIGS if file.stem != "stages-small"]  # that one is `convert assemble`'s
PHASE = {"minutes": 1, "max_steps": 1}


def objective(config: dict, kind: type[VolumeObjective]) -> None:
    kind(config, 3.2)


def trained(config: dict) -> None:
    """Stage 1: a run reads its config before it looks for data."""
    multiview.run(config, data=Path("nowhere"), output=Path("nowhere"), device="cpu")


READERS = {  # of a stage's configs: how one is read, and a small one with all its sections
    "occupancy": (lambda config: objective(config, occupancy.OccupancyObjective), VOLUMES["occupancy"]),
    "sparse": (lambda config: objective(config, sparse.SparseObjective), VOLUMES["sparse"]),
    "elevation": (elevation.ElevationObjective, {"estimator": SMALL}),
    "multiview": (trained, {"components": COMPONENTS, "phases": dict.fromkeys(("vae", "vision", "unet"), PHASE)}),
    "finetune": (trained, {"base": "nowhere", "phases": {"first": PHASE, "second": PHASE}}),
}
SECTIONS = [
    *(
        (stage, way)
        for stage in ("occupancy", "sparse")
        for way in ("", "unet", "condition", "objective", "views", "training")
    ),
    *(("elevation", way) for way in ("", "estimator", "objective", "training")),
    *(("multiview", way) for way in ("", "components", "phases")),
    *(("multiview", f"components.{name}") for name in COMPONENTS),
    *(("multiview", f"phases.{name}") for name in ("vae", "vision", "unet")),
    *(("finetune", way) for way in ("", "phases.first", "phases.second")),
]


@pytest.mark.parametrize(("stage", "way"), SECTIONS, ids=[".".join(filter(None, pair)) for pair in SECTIONS])
def test_every_section_refuses_unknown_keys(stage, way):
    """Oracle: the section's name and the key stand in the error, whatever section it is; without the key, another error or none."""
    reader, config = READERS[stage]
    config = json.loads(json.dumps(config))  # no section is another one
    section = config
    for name in way.split(".") if way else ():
        section = section.setdefault(name, {})
    section["a_typo"] = 1
    name = ".".join(filter(None, ("config", way)))
    with pytest.raises(InputError, match=f"^{name}: has unknown keys a_typo\\."):
        reader(config)
    del section["a_typo"]
    try:
        reader(config)
    except (InputError, OSError) as error:
        assert stage in ("multiview", "finetune") and "nowhere" in str(error)


@pytest.mark.parametrize("file", TRAININGS, ids=lambda file: file.stem)
def test_every_config_in_the_repository_is_read(file):
    """Oracle: the sections' values, as far as they are plain, and defaults for the rest."""
    config, stage = json.loads(file.read_text()), file.stem.split("-")[0]
    kinds = {"occupancy": occupancy.OccupancyConfig, "sparse": sparse.SparseConfig}
    kinds |= {"elevation": elevation.ElevationConfig, "multiview": multiview.MultiviewConfig}
    kind, elsewhere = kinds[stage], pipeline_settings() if stage == "multiview" else ()
    found = read(finetune.FinetuneConfig if "base" in config else kind, config, elsewhere=elsewhere)
    if isinstance(found, multiview.MultiviewConfig):
        check_components(vars(found.components))
    for name in ("objective", "views", "training"):
        for key, value in config.get(name, {}).items():
            kept = getattr(getattr(found, name), key)
            assert (list(kept) if isinstance(kept, tuple) else kept) == value


def test_the_paper_s_ablations_cannot_be_misspelt():
    """Oracle: the key that is meant stands in the error. Table 4's rows d and e are in `views`, which used to pass anything over."""
    for key, meant in (("pertub", "perturb"), ("drawm", "drawn")):
        with pytest.raises(InputError, match=f"config.views: has unknown keys {key}. Did you mean {meant}?"):
            objective(VOLUMES["sparse"] | {"views": {key: 0.0}}, sparse.SparseObjective)
    with pytest.raises(InputError, match="config: has unknown keys view. Did you mean views?"):
        objective(VOLUMES["sparse"] | {"view": {}}, sparse.SparseObjective)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"multiview": "nowhere"}, "config.objective.multiview: there is no folder nowhere"),
        ({"occupancy": "nowhere"}, "config.objective.occupancy: there is no folder nowhere"),
        ({"predicted_support": 0.5}, "predicted_support needs occupancy"),
        ({"multiview": ".", "drawn_samples": 3}, "drawn views have no normals"),
        ({"distance_loss": "l3"}, "config.objective.distance_loss: got 'l3', expected 'l2' or 'l1'"),
        ({"support_levels": [1, 2, 3]}, "expected a list of 2 numbers"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    condition = VOLUMES["sparse"]["condition"] | {"maps": {"normals": 3}}
    with pytest.raises(InputError, match=words):
        objective(VOLUMES["sparse"] | {"condition": condition, "objective": settings}, sparse.SparseObjective)


def test_drawn_views_need_who_draws_them():
    with pytest.raises(InputError, match="drawn_samples needs multiview"):
        objective(VOLUMES["sparse"] | {"objective": {"drawn_samples": 3}}, sparse.SparseObjective)


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = Inner()
    pair: tuple[int, int] | None = None
    flag: bool = False
    parts: dict = None


def test_values_have_the_types_of_their_fields():
    """Oracle: dataclasses made by hand; whole numbers are numbers, true is none."""
    found = read(Outer, {"count": 2, "inner": {"rate": 1}, "pair": [3, 4], "flag": True, "parts": {"x": [1]}})
    assert found == Outer(2, Inner(rate=1), pair=(3, 4), flag=True, parts={"x": [1]})
    for section, words in (
        ({}, "config: lacks count"),
        ({"count": 2.5}, "config.count: got 2.5, expected a whole number"),
        ({"count": True}, "config.count: got True"),
        ({"count": 1, "flag": 1}, "config.flag: got 1, expected true or false"),
        ({"count": 1, "inner": {"rate": None}}, "config.inner.rate: got None, expected a number"),
        ({"count": 1, "inner": {"kind": "c"}}, "config.inner.kind: got 'c', expected 'a' or 'b'"),
        ({"count": 1, "inner": 3}, "config.inner: got 3, expected a section"),
        ({"count": 1, "pair": "ab"}, "config.pair: got 'ab', expected a list of 2 numbers or null"),
        ({"count": 1, "pair": [1, 2.5]}, "config.pair"),
        ([1], r"config: got \[1\], expected a section"),
    ):
        with pytest.raises(InputError, match=words):
            read(Outer, section)


def test_sections_of_any_name_are_read_one_by_one():
    config = {"base": "x", "phases": {"one": {"lr": 1, "trainable": "attention"}, "two": {}}}
    phases = read(finetune.FinetuneConfig, config).phases
    assert phases == {"one": finetune.PhaseSettings(lr=1, trainable="attention"), "two": finetune.PhaseSettings()}
    with pytest.raises(InputError, match="config.phases: got 3, expected sections by their names"):
        read(finetune.FinetuneConfig, config | {"phases": 3})
    with pytest.raises(InputError, match="config.phases.two: has unknown keys trainabel. Did you mean trainable?"):
        read(finetune.FinetuneConfig, config | {"phases": {"two": {"trainabel": "all"}}})


def test_settings_of_the_pipeline_are_its_own():
    """Oracle: the arguments of the pipeline that are saved in its config, and no component."""
    settings = pipeline_settings()
    assert {"view_size", "rig", "rigs", "clean_reference", "tile_positions", "ramping_coefficients"} <= settings.keys()
    assert settings["rig"] == "zero123plus-v1.2" and settings["rigs"] is None
    assert not {"unet", "vae", "scheduler", "controlnet"} & settings.keys()
