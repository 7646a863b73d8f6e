"""Pictures and their cameras as one value: tiles, folders, padding, and the door that cuts every view out."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import alpha_error, on
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from one2345pp import CameraRig, InputError, Views
from one2345pp.data.shapes import shape
from one2345pp.geometry.render import render
from one2345pp.geometry.tile import join_views, make_tile, split_tile, split_tiles
from one2345pp.pipelines.picture.isolate import cut_out_views


RIG = CameraRig.named("zero123plus-v1.2")


def views_of(name: str, rig: CameraRig = RIG, size: int = 32) -> Views:
    return Views([Image.fromarray(view) for view in render(shape(name), rig, size, shading="none")], rig)


# --- the value --------------------------------------------------------------------------------------------------------


def test_views_are_a_sequence_of_pictures():
    """Length, index, slice, iteration and sum are those of the pictures, and the cameras go along."""
    views = views_of("mug")
    assert len(views) == 6 and views[2] is list(views)[2] is views.images[2]
    both = views[1:3] + views[:1]
    assert [both[i] is views[j] for i, j in enumerate((1, 2, 0))] == [True] * 3
    assert both.rig == CameraRig.cat([RIG[1:3], RIG[:1]])
    mirrored = views.map(lambda view: view.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert mirrored.rig is views.rig and np.array_equal(np.asarray(mirrored[0])[:, ::-1], np.asarray(views[0]))


@pytest.mark.parametrize(
    ("images", "rig", "words"),
    [
        ([], RIG, "expected a list of PIL images"),
        (["view.png"], RIG, "expected a list of PIL images"),
        ([Image.new("RGB", (8, 8))] * 5, RIG, "got 5 images for rig 'zero123plus-v1.2', which has 6 cameras. Pass 6"),
        ([Image.new("RGB", (8, 8))], RIG[:2], "got 1 images for a rig of 2 cameras"),
        ([Image.new("RGB", (8, 8))] * 6, "zero123", "rig: got 'zero123', expected one of"),
    ],
)
def test_what_is_no_views_is_refused(images, rig, words):
    with pytest.raises(InputError, match=words):
        Views(images, rig)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_pictures_of_any_mode_are_rgb_or_rgba(mode, tmp_path):
    """So that they can be padded, cut out and saved like others."""
    views = Views([Image.new("RGB", (20, 30), "red").convert(mode)] * 6, RIG)
    assert {view.mode for view in views} == {"RGBA" if mode == "LA" else "RGB"}
    views.squared().save(tmp_path)
    assert Views.load(tmp_path)[0].size == (30, 30)


def test_callers_pass_views_or_pictures():
    """One object or several, `Views` or lists with cameras for all or for each; cameras beside `Views` are refused."""
    views, other = views_of("mug"), views_of("house", CameraRig.named("zero123plus-v1.1"))
    assert Views.of(views) is views and Views.of(list(views)).rig == RIG
    assert [one.rig for one in Views.batch(views)] == [RIG]
    assert [one.rig for one in Views.batch(list(views), "zero123plus-v1.1")] == [other.rig]
    assert Views.batch([views, other]) == [views, other]
    assert [one.rig for one in Views.batch([list(views), list(other)], [RIG, other.rig])] == [RIG, other.rig]
    with pytest.raises(InputError, match="cameras: these views have their own"):
        Views.of(views, RIG)
    with pytest.raises(InputError, match="cameras: got 1 rigs for 2 samples"):
        Views.batch([list(views), list(other)], [RIG])


def test_squares_see_what_the_pictures_saw():
    """Oracle: the same scene rendered square with the wider field of view, which belongs to a picture's width; an orthographic
    picture is as much wider. What is opaque is padded with its border's colours, what is not with nothing."""
    fov, size = 0.9, 64
    square = CameraRig.from_angles([20], 10, fov, 1.4)
    narrow = CameraRig(square.camera_to_world, torch.tensor(2 * math.atan(0.5 * math.tan(fov / 2))))
    flat = CameraRig.orthographic([20], 10)
    tall_flat = CameraRig.orthographic([20], 10, width=0.5)
    inner = slice(size // 4, -size // 4)
    for whole, rig, cut in (square, square, (inner, slice(None))), (square, narrow, (slice(None), inner)), (
        flat, tall_flat, (slice(None), inner)
    ):  # fmt: skip
        truth = render(shape("mug"), whole, size, shading="none")[0]
        (padded,), rig = (views := Views([Image.fromarray(truth[cut])], rig).squared()), views.rig
        assert padded.size == (size, size)
        torch.testing.assert_close(rig.tan_half_fov, whole.tan_half_fov)
        torch.testing.assert_close(rig.half_width, whole.half_width)
        pixels = np.asarray(padded)
        assert np.array_equal(pixels[cut], truth[cut]) and pixels[..., 3].sum() == truth[cut][..., 3].sum()
        opaque = Views([on((9, 99, 200), truth[cut])], rig).squared()[0]
        assert opaque.mode == "RGB" and opaque.getpixel((0, 0)) == (9, 99, 200)
    assert views_of("mug").squared().rig.name == "zero123plus-v1.2"


# --- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (127, 127, 127), (119, 119, 119), (225, 205, 180)])
@pytest.mark.parametrize("opaque_alpha", [False, True])
def test_every_plain_background_is_cut_out(background, opaque_alpha):
    """Oracle: the alpha that the views were composited with. White, black, the grey of tiles, a grey that is some levels off, and all
    of them saved with an alpha channel that says nothing."""
    views = views_of("mug", size=64)
    mode = "RGBA" if opaque_alpha else "RGB"
    flat = Views([on(background, np.asarray(view)).convert(mode) for view in views], RIG)
    cut = cut_out_views(flat)
    assert max(alpha_error(a, np.asarray(b)) for a, b in zip(cut, views, strict=True)) < 0.02
    assert cut_out_views(cut)[0] is cut[0]


def test_a_view_that_cannot_be_cut_out_is_named():
    """A view that the object fills is taken as it is with an alpha channel; without one it is refused, by its number."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    views = views_of("mug")
    assert cut_out_views(Views([noise.convert("RGBA")], RIG[:1]))[0].getextrema()[3] == (255, 255)
    with pytest.raises(InputError, match="views: number 2: .*neither transparency nor a plain background"):
        cut_out_views(Views([views[0], noise], RIG[:2]))


# --- tiles ------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(side=st.integers(1, 12), mode=st.sampled_from(["RGB", "RGBA"]), seed=st.integers(0, 99))
def test_tile_round_trip(side, mode, seed):
    """Splitting undoes making, whatever the size and mode, for pictures, arrays and tensors alike."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, side, side, len(mode)), np.uint8)
    tile = make_tile([Image.fromarray(view) for view in pixels])
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(split_tile(tile), pixels, strict=True))
    assert np.array_equal(split_tiles(np.asarray(tile)[None])[0], pixels)
    tensor = torch.from_numpy(pixels).movedim(-1, 1)
    joined = join_views(tensor)
    assert np.array_equal(joined.movedim(0, -1), np.asarray(tile))
    assert torch.equal(split_tiles(joined[None])[0], tensor)


def test_tile_order_is_row_major():
    """View 1 is to the right of view 0, view 2 below it."""
    tile = make_tile([Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(6)])
    assert tile.size == (8, 12)
    assert [tile.getpixel(p)[0] for p in ((0, 0), (5, 0), (0, 5))] == [0, 1, 2]


@pytest.mark.parametrize("size", [(640, 640), (960, 640), (641, 960), (640, 961), (1, 1)])
def test_wrong_tile_is_refused(size, tmp_path):
    """Transposed tiles and single pictures are the common mistakes."""
    Image.new("RGB", size).save(tmp_path / "tile.png")
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]}"):
        Views.load(tmp_path / "tile.png", RIG)


def test_load_a_tile(tmp_path):
    """A grey tile is split and paired with the cameras of the rig that is named; the door keys it."""
    rig = CameraRig.named("zero123plus-v1.1")
    pixels = render(shape("rocket"), rig, 64, shading="none")
    make_tile([on((127, 127, 127), view) for view in pixels]).save(tmp_path / "tile.png")
    views = cut_out_views(Views.load(tmp_path / "tile.png", "zero123plus-v1.1"))
    assert views.rig == rig
    assert max(alpha_error(view, truth) for view, truth in zip(views, pixels, strict=True)) < 0.02


# --- folders ----------------------------------------------------------------------------------------------------------


def write_folder(folder, images, rig, suffix=".png", keep=lambda name: name):
    names = [f"r_{index}{suffix}" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        image.save(folder / name)
    rig.save(folder / "cameras.json", [keep(name) for name in names])


def test_saved_views_load(tmp_path):
    """Pictures to the last bit, and cameras, pinhole and orthographic."""
    for rig in RIG, CameraRig.orthographic([0, 90], [0, 40], 1.2):
        views = views_of("chair", rig)
        views.save(tmp_path)
        again = Views.load(tmp_path)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(views, again, strict=True))
        torch.testing.assert_close(again.rig.camera_to_world, rig.camera_to_world)
        torch.testing.assert_close(again.rig.half_width, rig.half_width)


def test_load_a_folder(tmp_path):
    """RGBA comes back exactly; frames may lack their suffix as NeRF's do, or have a loud one; views on white are keyed at the door."""
    pixels = render(shape("chair"), RIG, 64, shading="none")
    for suffix in ".png", ".PNG":
        (folder := tmp_path / suffix[1:]).mkdir()
        write_folder(folder, [Image.fromarray(view) for view in pixels], RIG, suffix, lambda name: "./" + name[:-4])
        views = Views.load(folder)
        assert all(np.array_equal(np.asarray(view), truth) for view, truth in zip(views, pixels, strict=True))
        torch.testing.assert_close(views.rig.fov, RIG.fov)
    write_folder(tmp_path, [on((255, 255, 255), view) for view in pixels], RIG)
    views = cut_out_views(Views.load(tmp_path / "."))
    assert max(alpha_error(view, truth) for view, truth in zip(views, pixels, strict=True)) < 0.01


def test_large_views_are_shrunk(tmp_path):
    write_folder(tmp_path, [Image.new("RGBA", (size, size), "red") for size in (64, 48)], RIG[:2])
    assert [view.size for view in Views.load(tmp_path, max_side=40)] == [(40, 40)] * 2
    assert [view.size for view in Views.load(tmp_path)] == [(64, 64)] * 2


def test_loading_refuses_in_words(tmp_path):
    """Each mistake with folders and tiles is told by name."""
    rig = CameraRig.from_angles([0, 90], 0, 0.7, 1.6)
    Image.new("RGB", (64, 96), (127, 127, 127)).save(tmp_path / "tile.png")
    with pytest.raises(InputError, match="cameras.json"):
        Views.load(tmp_path)
    write_folder(tmp_path, [Image.fromarray(view) for view in render(shape("mug"), rig, 32)], rig)
    with pytest.raises(InputError, match="tile images only"):
        Views.load(tmp_path, "zero123plus-v1.2")
    (tmp_path / "r_1.png").unlink()
    with pytest.raises(InputError, match="frame 'r_1.png'"):
        Views.load(tmp_path)
    Image.new("RGBA", (32, 32)).save(tmp_path / "r_1.png")
    with pytest.raises(InputError, match="r_1.png: is fully transparent"):
        Views.load(tmp_path)
    with pytest.raises(InputError, match="zero123plus-v1.2 or zero123plus-v1.1"):
        Views.load(tmp_path / "tile.png")
    with pytest.raises(InputError, match="no such file"):
        Views.load(tmp_path / "nothing")
    data = json.loads((tmp_path / "cameras.json").read_text())
    data["frames"][0]["transform_matrix"] = [[1, 2], [3, 4]]
    (tmp_path / "cameras.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="r_0.png"):
        Views.load(tmp_path)
