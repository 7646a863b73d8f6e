"""Draws docs/images/example.png: shapes of this project made from one image, and from six views, by the checkpoint in the package.

python examples/make_sheet.py
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from one2345pp import CameraRig, One2345PlusPlusPipeline, Views, default_checkpoint
from one2345pp.data.shapes import shape
from one2345pp.geometry.mesh import normalize_to_sphere
from one2345pp.geometry.render import contact_sheet, orbit, render


NAMES = ("mug", "chair", "mushroom", "rocket")
EXAMPLES = Path(__file__).parent
OUTPUT = EXAMPLES.parent / "docs" / "images" / "example.png"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_checkpoint())
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    pipe = One2345PlusPlusPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    rig, sides, rows = CameraRig.named("zero123plus-v1.2"), orbit(4).rotated(30)[[0, 1, 2]], []
    for name in args.names:
        image = pipe.prepare_image(EXAMPLES / f"{name}.png")
        generated = pipe(image, background="none", generator=torch.Generator().manual_seed(0)).meshes[0]
        views = Views([Image.fromarray(view) for view in render(normalize_to_sphere(shape(name)), rig, 192)], rig)
        rebuilt = pipe.reconstruct(views, generator=torch.Generator().manual_seed(0)).meshes[0]
        rows.append([image, *render(generated, sides, 192), *views[:2], *render(rebuilt, sides, 192)])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, 128).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
