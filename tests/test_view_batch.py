"""Views as condition encoders take them: the encoding, maps by name, cameras of either kind, configs from before maps had names."""

import json

import numpy as np
import pytest
import torch
from conftest import multiview_components
from PIL import Image

from one2345pp import CameraRig, ConditionEncoder, InputError
from one2345pp.geometry.cameras import project
from one2345pp.models.condition_encoder import project_pixels
from one2345pp.models.global_vector import global_vector
from one2345pp.models.sparse import SparseGrid
from one2345pp.models.view_batch import ViewBatch, encode_pictures


PINHOLE = CameraRig.named("zero123plus-v1.2")
FLAT = CameraRig.orthographic([0, 90, 200], [10, -20, 35], width=[1.2, 0.9, 1.0])
MAPS = {"normals": 3, "depth": 1}  # not in the order of their names


def pictures(count: int, side: int = 16, mode: str = "RGBA", seed: int = 0) -> list[Image.Image]:
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (count, side, side, *bands), np.uint8)
    return [Image.fromarray(value) for value in values]


def encoder(**changes) -> ConditionEncoder:
    torch.manual_seed(0)
    config = {"resolution": 8, "channels": (6, 10), "image_size": 16, "stem_channels": (8,), "patch_channels": 0}
    return ConditionEncoder(**config | {"hidden_channels": 12} | changes).eval()


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "overshoot"), [(8, 0.01), (16, 0.01), (40, 0.11)])
def test_colour_is_seen_on_mid_grey_and_what_is_clear_has_none(size, overshoot):
    """Oracle: the formula on flat pictures, at any size; colours of clear pixels do not bleed into the edge of the opaque half."""
    soft = Image.new("RGBA", (16, 16), (255, 0, 128, 102))
    half = Image.new("RGBA", (16, 16), (9, 250, 9, 0))
    half.paste((200, 100, 50, 255), (8, 0, 16, 16))
    shown, cut = encode_pictures([soft, half], size)
    expected = torch.tensor([0.4, -0.4, 0.0, -0.2])
    assert shown.shape == (4, size, size)
    torch.testing.assert_close(shown, expected[:, None, None].expand_as(shown), atol=0.005, rtol=0)
    colors, alpha = torch.tensor([200.0, 100.0, 50.0]) / 127.5 - 1, (cut[3] + 1) / 2
    torch.testing.assert_close(cut[:3], colors[:, None, None] * alpha, atol=overshoot, rtol=0)
    assert alpha[:, 0].max() < 0.01 and alpha[:, -1].min() > 0.99


def test_maps_come_after_rgba_in_the_order_of_their_names():
    """Oracle: each map alone. They are cut out by the picture's alpha, and may have another size."""
    views, normals, depth = pictures(2), pictures(2, 20, "RGB", 1), pictures(2, 16, "L", 2)
    plain = encode_pictures(views, 16)
    both = encode_pictures(views, 16, {"normals": normals, "depth": depth})
    assert both.shape == (2, 8, 16, 16)
    assert torch.equal(both[:, :4], plain)
    assert torch.equal(both[:, :5], encode_pictures(views, 16, {"depth": depth}))
    assert torch.equal(both[:, 5:], encode_pictures(views, 16, {"normals": normals})[:, 4:])
    assert not torch.equal(both[:, 5:6], both[:, 4:5])
    clear = [Image.merge("RGBA", (*view.split()[:3], Image.new("L", view.size))) for view in views]
    assert not encode_pictures(clear, 16, {"normals": normals})[:, 4:].any()
    with pytest.raises(ValueError):
        encode_pictures(views, 16, {"depth": depth[:1]})


def test_a_sample_with_fewer_views_is_padded_with_absent_ones():
    """Oracle: each sample alone, also in what an encoder makes of it."""
    both, rigs = [pictures(6), pictures(3, seed=3)], [PINHOLE, FLAT]
    maps = [{"depth": pictures(len(rig), mode="L", seed=4)} for rig in rigs]
    batch = ViewBatch.from_pictures(both, rigs, 16, maps)
    assert batch.images.shape == (2, 6, 5, 16, 16)
    assert batch.present.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    model = encoder(maps={"depth": 1})
    for index, rig in enumerate(rigs):
        alone = ViewBatch.from_pictures([both[index]], [rig], 16, [maps[index]])
        for name in ("images", "world_to_camera", "tan_half_fov", "half_width"):
            assert torch.equal(getattr(batch, name)[index, : len(rig)], getattr(alone, name)[0]), name
        torch.testing.assert_close(model(batch)[0][index], model(alone)[0][0], atol=1e-5, rtol=0)


def test_the_global_vector_is_of_the_picture_on_the_tiles_grey():
    """Oracle: the parts by hand on a picture laid on grey here; what is clear has no colour; the length is sqrt(G)."""
    parts = multiview_components()
    encoder, extractor = parts["vision_encoder"], parts["feature_extractor_clip"]
    clear, other = pictures(2, 20)
    for picture in (clear, other):
        picture.putalpha(pictures(1, 20, "L", 9)[0])
        flat = np.asarray(picture, np.float32)
        cover = flat[..., 3:] / 255
        on_grey = Image.fromarray((flat[..., :3] * cover + 127 * (1 - cover)).round().astype(np.uint8))
        with torch.no_grad():
            embeds = encoder(extractor(on_grey, return_tensors="pt").pixel_values).image_embeds
        vector = global_vector(encoder, extractor, [picture], "cpu")
        width = embeds.shape[1]
        torch.testing.assert_close(vector, embeds / embeds.norm() * width**0.5, atol=0.02, rtol=0)
        assert vector.dtype == torch.float32 and not vector.requires_grad
    hole = clear.copy()
    hole.putalpha(0)
    flat = Image.new("RGB", hole.size, (127, 127, 127))
    assert torch.equal(*(global_vector(encoder, extractor, [one], "cpu") for one in (hole, flat)))
    both = global_vector(encoder, extractor, [clear, other], "cpu")
    torch.testing.assert_close(both[1:], vector)
    assert not torch.allclose(both[0], both[1])


# --- cameras --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rig", [PINHOLE, FLAT, CameraRig.cat([FLAT, PINHOLE])], ids=["pinhole", "flat", "both"])
def test_voxels_read_what_cameras_of_either_kind_see(rig):
    """Oracle: `project` and `directions_to` of the rig."""
    batch = ViewBatch.from_pictures([pictures(len(rig))] * 2, [rig[list(range(len(rig)))[::-1]], rig], 16)
    axis = (torch.arange(64) + 0.5) / 32 - 1
    places = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(len(rig), -1, -1, -1)
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * 0.4 - 0.2
    torch.testing.assert_close(batch.sample(places, points, 1), project(points, rig)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.directions(points, 1), rig.directions_to(points), atol=1e-6, rtol=0)
    grid = SparseGrid(torch.tensor([[1, 4, 4, 4], [1, 2, 5, 3]]), 8, 2)
    centers = (grid.coords[:, 1:] + 0.5) / 8 - 0.5
    expected = rig.directions_to(centers).transpose(0, 1)
    torch.testing.assert_close(project_pixels(batch, grid).directions, expected, atol=1e-6, rtol=0)


def test_a_batch_moves_whole(cuda):
    """On a pretended GPU: every tensor comes along."""
    batch = ViewBatch.from_pictures([pictures(3)], [FLAT], 16).to(cuda)
    tensors = [value for value in vars(batch).values() if value is not None]
    assert len(tensors) == 5 and all(value.device.type == "cuda" for value in tensors)


# --- encoders and their maps ------------------------------------------------------------------------------------------


def test_maps_of_an_encoder_survive_its_file(tmp_path):
    """Oracle: the same pyramid from the file, whose keys are sorted, as from the encoder that was made in another order."""
    model = encoder(maps=MAPS)
    maps = {"normals": pictures(6, mode="RGB", seed=1), "depth": pictures(6, mode="L", seed=2)}
    batch = ViewBatch.from_pictures([pictures(6)], [PINHOLE], 16, [maps])
    model.save_pretrained(tmp_path)
    loaded = ConditionEncoder.from_pretrained(tmp_path)
    assert loaded.config.maps == MAPS and loaded.view_channels == 8
    assert torch.equal(loaded(batch)[1], model(batch)[1])
    for name in MAPS:  # each reaches the pyramid
        other = ViewBatch.from_pictures([pictures(6)], [PINHOLE], 16, [maps | {name: maps[name][::-1]}])
        assert not torch.equal(model(other)[0], model(batch)[0])


def test_views_without_the_maps_are_refused():
    batch = ViewBatch.from_pictures([pictures(6)], [PINHOLE], 16)
    with pytest.raises(InputError, match=r"have 4 channels, this encoder takes 8: .* then maps \{'normals'"):
        encoder(maps=MAPS)(batch)
    assert encoder().config.maps is None and encoder(maps={}).view_channels == 4


@pytest.mark.parametrize(
    ("old", "maps"),
    [({"view_channels": 4, "view_kinds": False}, None), ({"view_channels": 7}, {"normals": 3}), ({}, None)],
)
def test_configs_from_before_maps_had_names_load_without_a_word(old, maps, tmp_path, caplog):
    """Oracle: the weights' own pyramid; nothing is said, and what is saved again has the new form alone."""
    model = encoder(maps=maps)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["maps"]
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    caplog.clear()
    with caplog.at_level("WARNING", logger="diffusers"):
        loaded = ConditionEncoder.from_pretrained(tmp_path)
    assert not caplog.records and loaded.config.maps == maps
    rows = None if maps is None else [{"normals": pictures(6, mode="RGB")}]
    batch = ViewBatch.from_pictures([pictures(6)], [PINHOLE], 16, rows)
    assert torch.equal(loaded(batch)[0], model(batch)[0])
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["maps"] == maps and not {"view_channels", "view_kinds"} & again.keys()


@pytest.mark.parametrize("old", [{"view_kinds": True}, {"view_channels": 5}])
def test_encoders_of_what_is_gone_are_refused(old):
    with pytest.raises(InputError, match="Train it again"):
        ConditionEncoder.from_config(dict(encoder().config) | old)
