"""Draws docs/images/example.png: shapes of this project rebuilt from six views by the checkpoint in the package.

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
OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "example.png"


def main() -> None:
    pipe = One2345PlusPlusPipeline.from_pretrained(default_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    rig, rows = CameraRig.named("zero123plus-v1.2"), []
    for name in NAMES:
        views = [Image.fromarray(view) for view in render(normalize_to_sphere(shape(name)), rig, 192)]
        mesh = pipe.volume(views, rig, generator=torch.Generator().manual_seed(0)).meshes[0]
        mesh = pipe.texture(mesh, views, rig, generator=torch.Generator().manual_seed(0)).meshes[0]
        rows.append([*views[:3], *render(mesh, orbit(4).rotated(30), 192)])
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, 144).save(OUTPUT, optimize=True)


if __name__ == "__main__":
    main()
