"""Draws docs/images/example.png: shapes of this project made from one image, and from six views, by the checkpoint in the package.

python examples/make_sheet.py
"""

from pathlib import Path

import torch
from PIL import Image

from one2345pp import CameraRig, One2345PlusPlusPipeline, default_checkpoint
from one2345pp.data.shapes import shape
from one2345pp.geometry.mesh import normalize_to_sphere
from one2345pp.geometry.render import contact_sheet, orbit, render


NAMES = ("mug", "chair", "mushroom", "rocket")
EXAMPLES = Path(__file__).parent
OUTPUT = EXAMPLES.parent / "docs" / "images" / "example.png"


def main() -> None:
    pipe = One2345PlusPlusPipeline.from_pretrained(default_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    rig, sides, rows = CameraRig.named("zero123plus-v1.2"), orbit(4).rotated(30)[[0, 1, 2]], []
    for name in NAMES:
        image = pipe.prepare_image(EXAMPLES / f"{name}.png")
        generated = pipe(image, generator=torch.Generator().manual_seed(0)).meshes[0]
        views = [Image.fromarray(view) for view in render(normalize_to_sphere(shape(name)), rig, 192)]
        rebuilt = pipe.volume(views, rig, generator=torch.Generator().manual_seed(0)).meshes[0]
        rebuilt = pipe.texture(rebuilt, views, rig, generator=torch.Generator().manual_seed(0)).meshes[0]
        rows.append([image, *render(generated, sides, 192), *views[:2], *render(rebuilt, sides, 192)])
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, 128).save(OUTPUT, optimize=True)


if __name__ == "__main__":
    main()
