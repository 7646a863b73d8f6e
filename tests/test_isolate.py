"""Pictures in: every kind of file, and objects cut out of them; and one clear error for each thing that cannot be used."""

import numpy as np
import pytest
from conftest import alpha_error, on
from PIL import Image, ImageCms, ImageDraw
from scipy import ndimage

from one2345pp import CameraRig, InputError
from one2345pp.data.shapes import shape
from one2345pp.geometry.pictures import open_image
from one2345pp.geometry.render import render
from one2345pp.pipelines.picture import isolate
from one2345pp.pipelines.picture.cutout import key, plain_background
from one2345pp.pipelines.picture.isolate import isolate_object, key_background


@pytest.fixture(scope="module")
def mug():
    """The mug from the front, `[256, 256, 4]`; its handle has a hole."""
    return render(shape("mug"), CameraRig.from_angles([0], 15, 0.7, 1.6), 256, shading="none")[0]


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


def backdrop(kind: str, mug: np.ndarray) -> Image.Image:
    """The mug on white, whose transparency says little: one clear pixel, round corners, or a larger canvas about it."""
    picture = on((255, 255, 255), mug).convert("RGBA")
    if kind == "pixel":
        picture.putpixel((3, 3), (0, 0, 0, 0))
    elif kind == "corners":
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, 255, 255), 24, fill=255)
        picture.putalpha(mask)
    else:
        canvas = Image.new("RGBA", (320, 256))
        canvas.paste(picture, (40, 0))
        picture = canvas
    return picture


@pytest.mark.parametrize("kind", ["pixel", "corners", "canvas"])
def test_transparency_that_is_no_cut_out(mug, kind):
    """Oracle: the mug's own alpha. The same for one view of several; a cut-out stays what it is, and so does an opaque square."""
    picture = backdrop(kind, mug)
    truth = mug
    if kind == "canvas":
        truth = np.zeros((256, 320, 4), np.uint8)
        truth[:, 40:296] = mug
    for cut in isolate_object(picture), isolate.cut_out_view(picture):
        assert alpha_error(cut, truth) < 0.01
    square = Image.new("RGBA", (64, 64))
    square.paste((200, 30, 30, 255), (16, 16, 48, 48))
    book = square.copy()  # plain but for its title, and cut out already
    book.paste((240, 240, 240, 255), (26, 24, 38, 30))
    for whole in square, book, Image.fromarray(mug):
        assert isolate_object(whole).tobytes() == isolate.cut_out_view(whole).tobytes() == whole.tobytes()


def swapped_profile() -> bytes:
    """sRGB with red and green in each other's place: the tags' offsets in the table are swapped, and the name is another one."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_open_image_follows_the_profile(tmp_path, mode):
    """Oracle: a colour space in which red is green. sRGB's own profile, and one that is damaged, change nothing; alpha stays."""
    picture = Image.new("RGB", (8, 8), (200, 20, 60))
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize((8, 8)))
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, color in (same, (200, 20, 60)), (b"nothing", (200, 20, 60)), (swapped_profile(), (20, 200, 60)):
        picture.save(tmp_path / "x.png", icc_profile=profile)
        pixels = np.asarray(open_image(tmp_path / "x.png"))
        assert np.abs(pixels[..., :3].astype(int) - color).max() <= 1
        assert mode == "RGB" or np.array_equal(pixels[..., 3], np.asarray(picture)[..., 3])


def test_isolate_refuses_in_words(mug, monkeypatch):
    """What shows no object, or none that can be found, is refused with what to do; an unused alpha channel is no cut-out."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    monkeypatch.setattr(isolate.importlib.util, "find_spec", lambda name: None)
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
