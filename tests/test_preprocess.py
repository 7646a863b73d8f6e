"""Pictures in: every kind of file, cutting out, tiles, folders of views; and one clear error for each thing that cannot be used."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from one2345pp import CameraRig, InputError
from one2345pp.data.shapes import shape
from one2345pp.geometry.render import render
from one2345pp.pipelines import preprocess
from one2345pp.pipelines.cutout import key, plain_background
from one2345pp.pipelines.preprocess import (
    isolate_object,
    key_background,
    load_views,
    make_tile,
    open_image,
    split_tile,
)


@pytest.fixture(scope="module")
def mug():
    """The mug from the front, `[256, 256, 4]`; its handle has a hole."""
    return render(shape("mug"), CameraRig.from_angles([0], 15, 0.7, 1.6), 256, shading="none")[0]


def on(background, rgba) -> Image.Image:
    """A cut-out composited on a background (a colour, or pixels)."""
    alpha = rgba[..., 3:] / 255
    return Image.fromarray(np.round(rgba[..., :3] * alpha + np.array(background) * (1 - alpha)).astype(np.uint8))


def alpha_error(cut: Image.Image, truth: np.ndarray) -> float:
    return np.abs(np.asarray(cut)[..., 3].astype(float) - truth[..., 3]).mean() / 255


# --- reading --------------------------------------------------------------------------------------------------------


def picture(mode: str) -> Image.Image:
    """Left half red (or dark), right half white; in modes with transparency the right half is transparent."""
    rgb = Image.new("RGB", (40, 20), (255, 255, 255))
    rgb.paste((200, 30, 30), (0, 0, 20, 20))
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (0, 0, 20, 20))
    if mode == "P+t":
        indexed = Image.new("P", (40, 20), 1)
        indexed.putpalette([200, 30, 30, 255, 255, 255])
        indexed.paste(0, (0, 0, 20, 20))
        indexed.info["transparency"] = 1
        return indexed
    if mode == "I;16":
        return Image.fromarray(np.where(np.asarray(mask) > 0, 20000, 65535).astype(np.uint16))
    if mode in ("RGBA", "LA"):
        rgb.putalpha(mask)
    return rgb.convert(mode)


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", "jpg"),
        ("L", "png"),
        ("1", "png"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("RGBA", "webp"),
        ("LA", "png"),
        ("P+t", "png"),
    ]
    + [("I;16", "png"), ("I", "tiff"), ("F", "tiff"), ("YCbCr", "jpg"), ("HSV", "tiff"), ("LAB", "tiff")],
)
def test_open_image_reads_every_mode(tmp_path, mode, suffix):
    """The left half stays darker than the right, transparency survives, and the mode is one of two."""
    path = tmp_path / f"x.{suffix}"
    source = picture("RGB" if mode in ("HSV",) else mode if mode != "F" else "L")
    if mode == "F":
        source = Image.fromarray(np.asarray(source, np.float32) / 255)
    source.save(path)
    image = open_image(path)
    transparent = mode in ("RGBA", "LA", "P+t")
    assert image.mode == ("RGBA" if transparent else "RGB")
    assert image.size == (40, 20)
    pixels = np.asarray(image).astype(int)
    if transparent:
        assert (pixels[10, 5, 3], pixels[10, 35, 3]) == (255, 0)
    assert pixels[10, 5, 1] + 50 < pixels[10, 35, 1] or transparent


def test_open_image_keeps_16_bit_levels(tmp_path):
    """20000 of 65535 is 78 of 255: scaled, not clipped."""
    picture("I;16").save(tmp_path / "x.png")
    assert np.asarray(open_image(tmp_path / "x.png"))[10, [5, 35], 0].tolist() == [78, 255]


def test_open_image_turns_by_exif(tmp_path):
    """A phone's sideways picture comes out upright: orientation 6 means turn a quarter clockwise."""
    image = picture("RGB")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    for source in (tmp_path / "x.png", Image.open(tmp_path / "x.png"), open_image(tmp_path / "x.png")):
        turned = np.asarray(open_image(source))
        assert turned.shape == (40, 20, 3)
        assert turned[0, 10, 1] < 100 < turned[-1, 10, 1]


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.uint8), None, 5])
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(InputError, match="image: got .*expected a PIL image or a file"):
        open_image(image)


def test_open_image_refuses_in_words(tmp_path, monkeypatch):
    """Missing, a folder, empty, no picture, cut short, too large: an InputError that names the file."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    for name in ("missing.png", "empty.png", "text.png", "short.png", "."):
        with pytest.raises(InputError) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="million pixels"):
        open_image(tmp_path / "whole.png")


# --- cutting out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [(255, 255, 255), (127, 127, 127), (20, 30, 90), (225, 205, 180)])
@pytest.mark.parametrize("noise", [0, 4])
def test_key_recovers_alpha_and_color(mug, background, noise):
    """Oracle: the alpha that the object was composited with; the handle's hole is empty, the white band on the mug is not."""
    image = np.asarray(on(background, mug)).astype(float)
    image = image + np.random.default_rng(0).normal(0, noise, image.shape)
    cut = isolate_object(Image.fromarray(image.clip(0, 255).astype(np.uint8)))
    assert alpha_error(cut, mug) < (0.004 if noise == 0 else 0.008)
    solid = mug[..., 3] == 255
    error = np.abs(np.asarray(cut)[solid, :3].astype(float) - mug[solid, :3]).mean()
    assert error < 1 + noise


def test_key_edges_are_free_of_the_background(mug):
    """Half-covered pixels of a red mug on blue: composited on black, blue must not remain as it does without unmixing."""
    image = on((0, 0, 255), mug)
    cut = np.asarray(isolate_object(image)).astype(float)
    edge = (mug[..., 3] > 40) & (mug[..., 3] < 215)
    blue = (cut[..., 2] * cut[..., 3] / 255)[edge].mean()
    assert blue < 0.5 * (np.asarray(image)[..., 2].astype(float) * mug[..., 3] / 255)[edge].mean()


def test_key_follows_a_gradient_and_an_object_at_the_border(mug):
    """Studio backgrounds drift in brightness, and objects are cut off by the picture."""
    ramp = np.linspace(120, 170, 256)[:, None, None] * np.ones((1, 256, 3))
    shifted = np.roll(mug, 60, axis=0)
    shifted[:60] = 0
    cut = isolate_object(on(ramp, shifted))
    assert alpha_error(cut, shifted) < 0.01


def shadowed(background, rgba, strength: float, blur: float) -> Image.Image:
    """A cut-out that throws a soft shadow to the lower right, on a plain background."""
    thrown = np.roll(rgba[..., 3], (14, 30), (0, 1)).astype(float)
    light = 1 - strength / 255 * ndimage.gaussian_filter(thrown, blur)
    return on(np.array(background) * light[..., None], rgba)


@pytest.mark.parametrize("background", [(255, 255, 255), (225, 205, 180)])
@pytest.mark.parametrize("strength, blur", [(0.3, 8), (0.5, 10)])
@pytest.mark.parametrize("grey", [False, True])
def test_soft_shadows_are_background(mug, background, strength, blur, grey):
    """Oracle: the alpha of the object alone, red or grey, but for the shadow in the handle, 2% of the picture."""
    rgba = mug.copy()
    if grey:
        rgba[..., :3] = (0.6 * rgba[..., :3].mean(-1, keepdims=True)).astype(np.uint8)
    image = shadowed(background, rgba, strength, blur)
    pixels = np.asarray(image, np.float32)
    with_shadow = key(pixels, *plain_background(pixels))
    assert alpha_error(with_shadow, rgba) > 0.08
    assert alpha_error(isolate_object(image), rgba) < 0.027


def test_soft_objects_are_no_shadows():
    """Out of focus, a grey ball on white looks like a shadow, but there is nothing else."""
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    ball = 1 - 0.6 * ndimage.gaussian_filter((x * x + y * y < 0.3).astype(float), 12)
    cut = isolate_object(Image.fromarray((255 * ball[..., None] * np.ones(3)).astype(np.uint8)))
    assert 0.15 < (np.asarray(cut)[..., 3] > 127).mean() < 0.5


def test_white_object_on_white_keeps_its_inside():
    """Only background that reaches the border is removed: a white plate with a grey rim, on white, stays whole."""
    image = Image.new("RGB", (200, 200), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 170, 170), fill=(170, 170, 170))
    draw.ellipse((40, 40, 160, 160), fill=(255, 255, 255))
    alpha = np.asarray(isolate_object(image))[..., 3]
    assert alpha[100, 100] == 255 and alpha[5, 5] == 0


def test_own_transparency_and_mask_decide(mug):
    """A cut-out comes back as it is; a mask wins over everything and must fit."""
    cut_out = Image.fromarray(mug)
    assert np.array_equal(np.asarray(isolate_object(cut_out)), mug)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8))
    masked = isolate_object(noise, mask=Image.fromarray(mug[..., 3]))
    assert np.array_equal(np.asarray(masked)[..., 3], mug[..., 3])
    with pytest.raises(InputError, match="10x10 pixels, the image 256x256"):
        isolate_object(noise, mask=Image.new("L", (10, 10)))


def test_isolate_refuses_in_words(mug, monkeypatch):
    """What shows no object, or none that can be found, is refused with what to do; an unused alpha channel is no cut-out."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    monkeypatch.setattr(preprocess.importlib.util, "find_spec", lambda name: None)
    cases = [
        (Image.new("RGB", (64, 64), (9, 99, 9)), "auto", "flat colour"),
        (Image.new("RGBA", (64, 64)), "auto", "fully transparent"),
        (noise, "auto", "one2345pp\\[background\\]"),
        (noise, "key", "not plain"),
        (noise, "alpha", "no transparent background"),
        (on((255, 255, 255), mug).convert("RGBA"), "alpha", "no transparent background"),
        (noise, "magic", "expected one of auto"),
    ]
    for image, background, words in cases:
        with pytest.raises(InputError, match=words):
            isolate_object(image, background=background)
    speck = Image.new("RGBA", (64, 64))
    speck.putpixel((5, 5), (255, 0, 0, 255))
    with pytest.raises(InputError, match="no object"):
        isolate_object(speck)


def test_large_pictures_are_shrunk(mug):
    """A photograph of many megapixels costs no more than one of four; the object stays in place."""
    large = Image.fromarray(mug).resize((3000, 3000))
    small = isolate_object(large, max_side=128)
    assert small.size == (128, 128)
    assert alpha_error(small.resize((256, 256)), mug) < 0.02


def test_key_background_of_a_view(mug):
    """Generated views stand on grey 127 with a little noise; grey inside the object stays because it does not reach the border."""
    patched = mug.copy()
    patched[150:162, 90:102, :3] = 127
    image = np.asarray(on((127, 127, 127), patched)).astype(float) + np.random.default_rng(0).normal(
        0, 2, (256, 256, 3)
    )
    view = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    cut = key_background(view)
    assert alpha_error(cut, mug) < 0.02
    assert key_background(cut) is cut


# --- tiles and folders ----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(side=st.integers(1, 12), mode=st.sampled_from(["RGB", "RGBA"]), seed=st.integers(0, 99))
def test_tile_round_trip(side, mode, seed):
    """Splitting undoes making, whatever the size and mode."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, side, side, len(mode)), np.uint8)
    views = [Image.fromarray(view) for view in pixels]
    again = split_tile(make_tile(views))
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(again, pixels, strict=True))


def test_tile_order_is_row_major():
    """View 1 is to the right of view 0, view 2 below it."""
    tile = make_tile([Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(6)])
    assert tile.size == (8, 12)
    assert [tile.getpixel(p)[0] for p in ((0, 0), (5, 0), (0, 5))] == [0, 1, 2]


@pytest.mark.parametrize("size", [(640, 640), (960, 640), (641, 960), (640, 961), (1, 1)])
def test_wrong_tile_is_refused(size):
    """Transposed tiles and single pictures are the common mistakes."""
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]}"):
        split_tile(Image.new("RGB", size))


def write_folder(folder, views, rig, suffix=".png", keep=lambda name: name):
    names = [f"r_{index}{suffix}" for index in range(len(views))]
    for name, view in zip(names, views, strict=True):
        view.save(folder / name)
    rig.save(folder / "cameras.json", [keep(name) for name in names])


def test_load_views_of_a_folder(tmp_path):
    """RGBA comes back exactly, with its cameras; frames may lack their suffix as NeRF's do, and RGB views are keyed."""
    rig = CameraRig.named("zero123plus-v1.2")
    pixels = render(shape("chair"), rig, 64, shading="none")
    write_folder(tmp_path, [Image.fromarray(view) for view in pixels], rig, keep=lambda name: "./" + name[:-4])
    views, loaded = load_views(tmp_path)
    assert all(np.array_equal(np.asarray(view), truth) for view, truth in zip(views, pixels, strict=True))
    torch.testing.assert_close(loaded.camera_to_world, rig.camera_to_world)
    torch.testing.assert_close(loaded.fov, rig.fov)

    write_folder(tmp_path, [on((255, 255, 255), view) for view in pixels], rig)
    views, _ = load_views(tmp_path / ".")
    assert max(alpha_error(view, truth) for view, truth in zip(views, pixels, strict=True)) < 0.01


def test_close_up_views_keep_their_alpha(tmp_path):
    """A view that the object fills is opaque all over: with an alpha channel it is taken as it is, without one it is refused."""
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 4), np.uint8)
    noise[..., 3] = 255
    rig = CameraRig.from_angles([0], 0, 0.7, 1.6)
    write_folder(tmp_path, [Image.fromarray(noise)], rig)
    assert np.array_equal(np.asarray(load_views(tmp_path)[0][0]), noise)
    write_folder(tmp_path, [Image.fromarray(noise[..., :3])], rig)
    with pytest.raises(InputError, match="r_0.png"):
        load_views(tmp_path)


def test_wide_views_are_padded_and_the_field_of_view_follows(tmp_path):
    """Oracle: the same scene rendered square with the wider field of view; camera_angle_x belongs to the width."""
    square = CameraRig.from_angles([20], 10, 0.9, 1.4)
    truth = render(shape("mug"), square, 128, shading="none")[0]
    wide, tall = Image.fromarray(truth[32:96]), Image.fromarray(truth[:, 32:96])
    narrow = CameraRig(square.camera_to_world, torch.tensor(2 * math.atan(0.5 * math.tan(0.45))))
    for view, rig in ((wide, square), (tall, narrow)):
        write_folder(tmp_path, [view], rig)
        views, loaded = load_views(tmp_path)
        assert views[0].size == (128, 128)
        assert loaded.fov.item() == pytest.approx(0.9, rel=1e-5)
        pixels = np.asarray(views[0])
        inner = (slice(32, 96), slice(None)) if view is wide else (slice(None), slice(32, 96))
        assert np.array_equal(pixels[inner], truth[inner])
        assert pixels[..., 3].sum() == pixels[inner][..., 3].sum()


def test_load_views_of_a_tile(tmp_path):
    """A grey tile is split, keyed and paired with the cameras of the rig that is named."""
    rig = CameraRig.named("zero123plus-v1.1")
    pixels = render(shape("rocket"), rig, 64, shading="none")
    make_tile([on((127, 127, 127), view) for view in pixels]).save(tmp_path / "tile.png")
    views, loaded = load_views(tmp_path / "tile.png", "zero123plus-v1.1")
    torch.testing.assert_close(loaded.camera_to_world, rig.camera_to_world)
    assert max(alpha_error(view, truth) for view, truth in zip(views, pixels, strict=True)) < 0.02


def test_load_views_refuses_in_words(tmp_path):
    """Each mistake with folders and tiles is told by name."""
    rig = CameraRig.from_angles([0, 90], 0, 0.7, 1.6)
    Image.new("RGB", (64, 96), (127, 127, 127)).save(tmp_path / "tile.png")
    with pytest.raises(InputError, match="cameras.json"):
        load_views(tmp_path)
    write_folder(tmp_path, [Image.fromarray(view) for view in render(shape("mug"), rig, 32)], rig)
    with pytest.raises(InputError, match="tile images only"):
        load_views(tmp_path, "zero123plus-v1.2")
    (tmp_path / "r_1.png").unlink()
    with pytest.raises(InputError, match="frame 'r_1.png'"):
        load_views(tmp_path)
    Image.new("RGBA", (32, 32)).save(tmp_path / "r_1.png")
    with pytest.raises(InputError, match="r_1.png: is fully transparent"):
        load_views(tmp_path)
    with pytest.raises(InputError, match="zero123plus-v1.2 or zero123plus-v1.1"):
        load_views(tmp_path / "tile.png")
    with pytest.raises(InputError, match="no such file"):
        load_views(tmp_path / "nothing")
    data = json.loads((tmp_path / "cameras.json").read_text())
    data["frames"][0]["transform_matrix"] = [[1, 2], [3, 4]]
    (tmp_path / "cameras.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="r_0.png"):
        load_views(tmp_path)
