"""Draws the sheets of a model card from what `reconstruct_val.py` left in its output: every n-th name, in alphabetical order.

    python benchmarks/card_sheets.py OUT FOLDER [--every 4]

`val-reconstruct.png`: three of the six true views, the mesh rebuilt from all six from four sides, the truth from the same sides.
`val-generate.png`: the image, three drawn views, the mesh from four sides, the truth from the same sides.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from reconstruct_val import cut, mesh_file, true_pictures

from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.mesh import load_mesh, normalize_to_sphere
from one2345pp.geometry.render import contact_sheet, orbit, render


SIZE = 80  # pixels
VIEWS = (0, 2, 4)  # of the six


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="OUT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--every", type=int, default=4)
    args = parser.parse_args()
    names = sorted(path.stem for path in (args.results / "gt").glob("*.glb"))[:: args.every]
    rows: dict[str, list] = {"reconstruct": [], "generate": []}
    for name in names:
        truth = normalize_to_sphere(load_mesh(args.results / "gt" / f"{name}.glb"))
        sides = list(render(truth, orbit(4), 2 * SIZE))
        image, views = true_pictures(truth, CameraRig.named("zero123plus-v1.2"), 2 * SIZE)
        strip = args.results / "generated_views" / f"{name}.png"
        drawn = cut(Image.open(strip)) if strip.exists() else [Image.new("RGB", (SIZE, SIZE))] * 6
        rows["reconstruct"].append([*(views[i] for i in VIEWS), *mesh_sides(args.results, "reconstruct", name), *sides])
        rows["generate"].append(
            [image, *(drawn[i] for i in VIEWS), *mesh_sides(args.results, "generate", name), *sides]
        )
    for method, sheet in rows.items():
        contact_sheet(sheet, SIZE, gap=2).quantize(192).save(args.folder / f"val-{method}.png", optimize=True)


def mesh_sides(results: Path, method: str, name: str) -> list[np.ndarray]:
    """A predicted mesh from four sides, or nothing where there is none."""
    path = mesh_file(results, method, name)
    if not path.exists():
        return [np.zeros((SIZE, SIZE, 4), np.uint8)] * 4
    return list(render(load_mesh(path), orbit(4), 2 * SIZE))


if __name__ == "__main__":
    main()
