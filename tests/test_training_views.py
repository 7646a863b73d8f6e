"""Views while volume networks learn: they are encoded as a pipeline encodes them, and augmented all alike."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from test_training_volume import CONFIG, dataset, first_stage  # noqa: F401  four frames of two objects
from test_volume_variants import dataset as mapped  # noqa: F401  a frame with normals

from one2345pp import CameraRig, InputError
from one2345pp.data.maps import MAPS, Map
from one2345pp.data.prepare import RIGS
from one2345pp.models.global_vector import global_vector
from one2345pp.models.view_batch import ViewBatch
from one2345pp.training import occupancy
from one2345pp.training.views import SampleBatch, ViewSettings, perturb_cameras, to_pictures


STILL = ViewSettings().still()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(item: dict, size: int = 16, maps=(), seed: int = 0, **changes: float) -> SampleBatch:
    """A batch of one item, that nothing is done to but `changes`."""
    return SampleBatch([item], ViewSettings(**vars(STILL) | changes), size, maps, generator(seed))


def pictures(array: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(one.numpy()) for one in array]


# --- one encoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [12, 16, 24])
@pytest.mark.parametrize("maps", [(), ("normals",)])
def test_views_are_encoded_as_in_a_pipeline(mapped, size, maps):  # noqa: F811
    """Oracle: `ViewBatch.from_pictures` of the sample's own pictures, which pipelines call, to the last bit."""
    item = mapped[0]
    learned = batch(item, size, maps).views
    which = next(
        i
        for i, name in enumerate(RIGS)
        if torch.equal(CameraRig.named(name).world_to_camera, learned.world_to_camera[0])
    )
    own = slice(6 * which, 6 * which + 6)
    extra = [{name: pictures(item[name][own]) for name in maps}]
    seen = ViewBatch.from_pictures([pictures(item["views"][own])], [CameraRig.named(RIGS[which])], size, extra)
    assert learned.images.shape[2] == 4 + 3 * len(maps)
    for name, value in vars(seen).items():
        assert name == "patches" or torch.equal(getattr(learned, name), value), name


def test_the_vector_is_that_of_a_pipeline_and_is_dropped(dataset, first_stage):  # noqa: F811
    """Oracle: `global_vector` of the sample's own picture, which pipelines call; zero where the condition is dropped, and for a share
    of the others."""
    settings = {"multiview": str(first_stage), "vector_dropout": 0.5}
    config = CONFIG["occupancy"] | {
        "objective": settings,
        "unet": CONFIG["occupancy"]["unet"] | {"global_channels": 16},
    }
    objective = occupancy.OccupancyObjective(config, 3.2)
    item = dataset[0]
    inputs = objective.samples([item], STILL, generator()).inputs
    own = next(one for one in pictures(item["inputs"]) if np.array_equal(one, inputs[0]))
    expected = global_vector(objective.vision_encoder, objective.feature_extractor, [own], "cpu")
    assert expected.shape == (1, 16) and expected.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(objective.vector(inputs, torch.device("cpu")), expected)
    keep = (torch.arange(400) % 4 > 0).float()
    objective.vector = lambda pictures, device: expected.expand(400, -1)
    dropped = objective.dropped_vector([], keep, generator())
    shown = dropped.any(1)
    assert torch.equal(dropped[shown], expected.expand(int(shown.sum()), -1))
    assert not shown[keep == 0].any() and shown[keep == 1].float().mean().item() == pytest.approx(0.5, abs=0.1)
    objective.vision_encoder, objective.vector = None, type(objective).vector.__get__(objective)
    assert objective.dropped_vector(inputs, torch.ones(1), generator()) is None


def test_what_a_network_is_shown_follows_its_encoder(mapped):  # noqa: F811
    """Oracle: size and channels of its batches; maps that the data lack, and maps that nobody can draw, are refused."""
    condition = CONFIG["occupancy"]["condition"] | {"image_size": 12, "maps": {"normals": 3}}
    objective = occupancy.OccupancyObjective(CONFIG["occupancy"] | {"condition": condition}, 3.2)
    collated = objective.collate([mapped[0]] * 2, generator())
    assert collated["views"].images.shape == (2, 6, 7, 12, 12)
    bare = {key: value for key, value in mapped[0].items() if key != "normals"}
    with pytest.raises(InputError, match="views have no normals. Make the data set with --maps normals"):
        objective.collate([bare], generator())
    for maps in ({"depht": 1}, {"normals": 1}):
        with pytest.raises(InputError, match="config.condition.maps: got .*, expected some of normals of 3"):
            occupancy.OccupancyObjective(CONFIG["occupancy"] | {"condition": condition | {"maps": maps}}, 3.2)


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_mirrored_samples_stay_consistent(dataset):  # noqa: F811
    """Oracle: with cameras mirrored too, opaque pixels still lie on projections of the solid; a one-sided mirror would not."""
    mirrored = batch(dataset[3], mirror=1.0)
    centers = (((mirrored.sdf[0] < 0).nonzero() + 0.5) / 16 - 0.5).float()
    alpha = mirrored.views.sample(mirrored.views.images[0, :, 3:], centers, 0)[..., 0]
    assert (alpha > 0).float().mean() > 0.97


def test_normals_point_at_their_cameras_and_mirror(mapped):  # noqa: F811
    """Oracle: inside the object every normal has length 1 and looks towards the camera (+z); mirrored, x changes sign."""
    images = batch(mapped[0], maps=["normals"]).views.images[0]
    inside = images[:, 3] > 0.99
    normals = images[:, 4:].movedim(1, -1)[inside]
    assert (normals[:, 2] > 0).all()
    assert (normals.norm(dim=1) > 0.6).all(), "pixels at an edge mix two faces"
    assert normals.norm(dim=1).median() == pytest.approx(1, abs=0.02)
    mirrored = batch(mapped[0], maps=["normals"], mirror=1.0).views.images[0]
    expected = images.flip(-1)
    expected[:, 4] *= -1
    torch.testing.assert_close(mirrored, expected, atol=0.005, rtol=0)


def test_maps_keep_the_order_of_their_names_and_a_rule_each(mapped, monkeypatch):  # noqa: F811
    """Oracle: a second map, of one channel and first by its name, beside the normals of a mirrored sample."""
    monkeypatch.setitem(MAPS, "depth", Map(1, "normal"))
    item = mapped[0] | {"depth": mapped[0]["normals"][..., 2:]}
    both = batch(item, maps={"normals": 3, "depth": 1}, mirror=1.0).views.images
    assert both.shape == (1, 6, 8, 16, 16)
    assert torch.equal(both[:, :, 5:], batch(item, maps=["normals"], mirror=1.0).views.images[:, :, 4:])
    torch.testing.assert_close(both[:, :, 4], both[:, :, 7], atol=1e-6, rtol=0)
    assert torch.equal(both[:, :, 4], batch(item, maps=["depth"]).views.images[:, :, 4].flip(-1))


def test_colours_change_together_and_maps_stay(mapped):  # noqa: F811
    """Oracle: one order of the channels, the same in views, volume and input picture."""
    plain, recolored = (batch(mapped[0], maps=["normals"], seed=1, recolor=chance) for chance in (0.0, 1.0))

    def shows(order: list[int]) -> bool:
        """Whether all that is recoloured has this order of the channels."""
        views = torch.equal(recolored.views.images[:, :, :3], plain.views.images[:, :, order])
        inputs = np.array_equal(recolored.inputs[0], np.asarray(plain.inputs[0])[..., [*order, 3]])
        return views and inputs and torch.equal(recolored.colors, plain.colors[:, order])

    (order,) = (order for order in itertools.permutations(range(3)) if shows(list(order)))
    assert order != (0, 1, 2)
    assert torch.equal(recolored.views.images[:, :, 3:], plain.views.images[:, :, 3:])


def test_keyed_masks_are_not_the_true_ones_and_cut_maps_too(mapped):  # noqa: F811
    plain, keyed = (batch(mapped[0], maps=["normals"], rekey=chance).views.images for chance in (0.0, 1.0))
    differ = (plain[:, :, 3] - keyed[:, :, 3]).abs() > 0.01
    assert 0 < differ.float().mean() < 0.3
    assert not keyed[:, :, 4:].movedim(2, -1)[keyed[:, :, 3] < -0.999].any()


def test_drop_view_is_how_many_of_six_views_are_missing(dataset):  # noqa: F811
    """Oracle: the mean number of views that are missing, of 400 samples."""
    settings = ViewSettings(**vars(STILL) | {"drop_view": 1.5})
    views = SampleBatch([dataset[0]] * 400, settings, 4, (), generator()).views
    assert 6 - views.present.float().sum(1).mean().item() == pytest.approx(1.5, abs=0.2)


def test_perturbed_cameras_zoom_whatever_their_kind():
    """Oracle: the same factors on fields of view and on widths; matrices stay rigid and differ."""
    rig = CameraRig.cat([CameraRig.orthographic([0, 90], 10), CameraRig.named(RIGS[0])])
    fields = (rig.world_to_camera, rig.tan_half_fov, rig.half_width)
    matrix, tangent, half_width = perturb_cameras(*fields, ViewSettings(perturb_focal=0.2), generator())
    zoom = (tangent + half_width) / (rig.tan_half_fov + rig.half_width)
    assert (zoom - 1).abs().min() > 1e-3 and torch.equal(half_width > 0, rig.half_width > 0)
    rotation = matrix[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(8, 3, 3), atol=1e-5, rtol=0)
    assert (matrix - rig.world_to_camera).abs().amax((1, 2)).min() > 1e-4


def test_pictures_of_a_tensor_are_its_values():
    values = torch.randint(0, 256, (2, 4, 5, 5), generator=generator())
    for channels in (1, 3, 4):
        arrays = [np.asarray(picture).reshape(5, 5, channels) for picture in to_pictures(values[:, :channels] / 255)]
        assert np.array_equal(np.stack(arrays), values[:, :channels].movedim(1, -1))
