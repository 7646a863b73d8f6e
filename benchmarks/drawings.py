"""Benchmark: ten drawn pictures, no renders of any object, through `generate`: picture, six views, mesh from four sides.

    python benchmarks/drawings.py OUT [--model CHECKPOINT]

The pictures have soft shadows, light from elsewhere, backgrounds that are not grey, and objects off the centre. There is no truth to
compare with: the sheet, `OUT/drawings.png`, is to be looked at. `OUT/pictures` holds what goes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from one2345pp.errors import InputError
from one2345pp.geometry.render import orbit, render


SIZE = 512


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, "model", "limit", "seed", "threads")
    parser.add_argument("output", type=Path, metavar="OUT")
    args = harness.parse(parser, argv)
    folder = args.output / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    pipe, rows = harness.load_chain(args.model), []
    for name, picture in harness.spread(list(pictures().items()), args.limit):
        picture.save(folder / f"{name}.png")
        try:
            image = pipe.prepare_image(picture)
            generator = torch.Generator().manual_seed(args.seed)
            out = pipe(image, background="none", refine=False, generator=generator)
        except InputError as error:
            print(f"{name}: {error}", flush=True)
            continue
        rows.append([picture, image, *out.views[0], *render(out.meshes[0], orbit(4), 192)])
        print(name, flush=True)
    harness.save_sheet(rows, args.output / "drawings.png", 112)


def pictures() -> dict[str, Image.Image]:
    """Every drawing, shaded, on its background, with a shadow."""
    backgrounds = [(246, 243, 236), (255, 255, 255), (214, 226, 234), (236, 228, 214), (40, 44, 52)]
    return {
        name: paint(draw, backgrounds[i % len(backgrounds)], shift=(30 * math.cos(2 * i), 24 * math.sin(3 * i)))
        for i, (name, draw) in enumerate(DRAWINGS.items())
    }


def paint(draw: Callable, background: tuple[int, int, int], shift: tuple[float, float]) -> Image.Image:
    """A drawing in flat colours with round-looking shading and a soft shadow, moved by `shift` pixels and made a third smaller."""
    flat = Image.new("RGBA", (SIZE, SIZE))
    draw(ImageDraw.Draw(flat))
    flat = flat.resize((2 * SIZE // 3,) * 2, Image.Resampling.LANCZOS)
    place = [round(SIZE / 6 + s) for s in shift]
    layer = Image.new("RGBA", (SIZE, SIZE))
    layer.paste(flat, place)
    alpha = layer.getchannel("A")
    # light from the upper left: how far a pixel is inside to that side, by the blurred mask moved against itself
    soft = alpha.filter(ImageFilter.GaussianBlur(22))
    slope = np.asarray(ImageChops.offset(soft, 14, 14), np.float32) - np.asarray(
        ImageChops.offset(soft, -14, -14), np.float32
    )
    color = np.asarray(layer.convert("RGB"), np.float32) * (1 - 0.0022 * slope[..., None]).clip(0.45, 1.3)
    shaded = Image.fromarray(color.clip(0, 255).astype(np.uint8))
    out = Image.new("RGB", (SIZE, SIZE), background)
    box = alpha.getbbox()
    shadow = Image.new("L", (SIZE, SIZE))
    width, foot = box[2] - box[0], box[3]
    ImageDraw.Draw(shadow).ellipse((box[0] + 0.1 * width, foot - 14, box[2] + 0.15 * width, foot + 16), fill=70)
    out.paste((20, 20, 30), mask=shadow.filter(ImageFilter.GaussianBlur(9)))
    out.paste(shaded, mask=alpha)
    return out


# --- flat drawings on 512 by 512 ---------------------------------------------------------------------------------


def apple(d: ImageDraw.ImageDraw) -> None:
    d.rounded_rectangle((244, 60, 262, 150), 8, fill=(96, 62, 32, 255))
    d.ellipse((258, 66, 350, 116), fill=(84, 150, 58, 255))
    d.ellipse((70, 120, 290, 440), fill=(196, 40, 38, 255))
    d.ellipse((222, 120, 442, 440), fill=(196, 40, 38, 255))
    d.ellipse((130, 200, 382, 460), fill=(196, 40, 38, 255))


def fish(d: ImageDraw.ImageDraw) -> None:
    d.polygon([(350, 250), (480, 150), (450, 256), (480, 362)], fill=(240, 130, 40, 255))
    d.polygon([(170, 170), (290, 90), (320, 180)], fill=(226, 106, 32, 255))
    d.ellipse((30, 140, 390, 372), fill=(244, 150, 50, 255))
    d.ellipse((90, 210, 130, 250), fill=(255, 255, 255, 255))
    d.ellipse((100, 220, 120, 240), fill=(20, 20, 20, 255))
    d.pieslice((180, 250, 300, 350), -30, 120, fill=(226, 106, 32, 255))


def house(d: ImageDraw.ImageDraw) -> None:
    d.rectangle((340, 70, 390, 190), fill=(150, 74, 60, 255))
    d.polygon([(40, 240), (256, 60), (472, 240)], fill=(170, 60, 48, 255))
    d.rectangle((84, 238, 428, 460), fill=(232, 214, 176, 255))
    d.rectangle((220, 320, 296, 460), fill=(110, 74, 46, 255))
    for x in (116, 332):
        d.rectangle((x, 280, x + 64, 340), fill=(120, 170, 210, 255))


def tree(d: ImageDraw.ImageDraw) -> None:
    d.polygon([(226, 480), (236, 280), (276, 280), (288, 480)], fill=(112, 78, 48, 255))
    for box in ((90, 140, 290, 340), (220, 140, 420, 340), (140, 40, 370, 260)):
        d.ellipse(box, fill=(66, 132, 62, 255))


def car(d: ImageDraw.ImageDraw) -> None:
    d.polygon([(140, 230), (190, 140), (340, 140), (400, 230)], fill=(60, 90, 170, 255))
    d.polygon([(166, 228), (202, 160), (258, 160), (258, 228)], fill=(190, 216, 234, 255))
    d.polygon([(272, 228), (272, 160), (330, 160), (370, 228)], fill=(190, 216, 234, 255))
    d.rounded_rectangle((50, 226, 470, 340), 36, fill=(60, 90, 170, 255))
    for x in (110, 330):
        d.ellipse((x, 290, x + 90, 380), fill=(34, 34, 36, 255))
        d.ellipse((x + 26, 316, x + 64, 354), fill=(180, 180, 184, 255))


def cup(d: ImageDraw.ImageDraw) -> None:
    d.ellipse((330, 190, 470, 350), outline=(70, 150, 150, 255), width=30)
    d.polygon([(90, 140), (380, 140), (346, 430), (124, 430)], fill=(80, 168, 166, 255))
    d.ellipse((124, 400, 346, 460), fill=(80, 168, 166, 255))
    d.ellipse((90, 108, 380, 176), fill=(224, 240, 238, 255))
    d.ellipse((110, 118, 360, 166), fill=(92, 56, 36, 255))


def lamp(d: ImageDraw.ImageDraw) -> None:
    d.rectangle((244, 230, 268, 440), fill=(120, 120, 126, 255))
    d.ellipse((150, 420, 362, 476), fill=(96, 96, 102, 255))
    d.polygon([(190, 50), (322, 50), (410, 240), (102, 240)], fill=(240, 206, 110, 255))


def book(d: ImageDraw.ImageDraw) -> None:
    d.polygon([(60, 200), (330, 130), (460, 250), (180, 340)], fill=(128, 40, 72, 255))
    d.polygon([(60, 200), (180, 340), (180, 410), (60, 268)], fill=(96, 26, 52, 255))
    d.polygon([(180, 340), (460, 250), (460, 316), (180, 410)], fill=(236, 228, 206, 255))


def duck(d: ImageDraw.ImageDraw) -> None:
    d.ellipse((60, 220, 440, 450), fill=(246, 206, 60, 255))
    d.polygon([(400, 300), (480, 210), (450, 360)], fill=(246, 206, 60, 255))
    d.ellipse((70, 70, 270, 270), fill=(246, 206, 60, 255))
    d.ellipse((10, 160, 100, 206), fill=(236, 130, 40, 255))
    d.ellipse((120, 126, 150, 156), fill=(24, 24, 24, 255))
    d.pieslice((210, 260, 400, 400), 10, 170, fill=(226, 180, 40, 255))


def bottle(d: ImageDraw.ImageDraw) -> None:
    d.rounded_rectangle((226, 30, 286, 80), 8, fill=(170, 140, 100, 255))
    d.rectangle((232, 70, 280, 190), fill=(50, 110, 70, 255))
    d.ellipse((176, 150, 336, 270), fill=(50, 110, 70, 255))
    d.rounded_rectangle((176, 206, 336, 480), 22, fill=(50, 110, 70, 255))
    d.rectangle((176, 290, 336, 400), fill=(238, 230, 206, 255))


DRAWINGS = {f.__name__: f for f in (apple, fish, house, tree, car, cup, lamp, book, duck, bottle)}


if __name__ == "__main__":
    main()
