"""Draws the sheets of a model card from what `reconstruct_val.py` left in its output: every n-th name, in alphabetical order.

    python benchmarks/card_sheets.py OUT FOLDER [--every 4]

`val-reconstruct.png`: three of the six true views, the mesh rebuilt from all six from four sides, the truth from the same sides.
`val-generate.png`: the image, three drawn views, the mesh from four sides, the truth from the same sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
from PIL import Image

from one2345pp.geometry.mesh import load_mesh
from one2345pp.geometry.render import orbit, render
from one2345pp.geometry.views import DEFAULT_RIG


SIZE = 80  # pixels
VIEWS = (0, 2, 4)  # of the six
EMPTY = np.zeros((SIZE, SIZE, 4), np.uint8)  # where there is no mesh, or no views


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, "every")
    parser.set_defaults(every=4)
    parser.add_argument("results", type=Path, metavar="OUT")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    args = harness.parse(parser, argv)
    results = harness.Results(args.results)
    rows: dict[str, list] = {"reconstruct": [], "generate": []}
    for name in results.names[:: args.every]:
        truth = results.truth(name).load()
        strip = results.drawn_views(name)
        drawn = harness.split_row(Image.open(strip)) if strip.exists() else [EMPTY] * 6
        given = {
            "reconstruct": [harness.true_views(truth, DEFAULT_RIG, 2 * SIZE)[i] for i in VIEWS],
            "generate": [harness.front_picture(truth, 2 * SIZE), *(drawn[i] for i in VIEWS)],
        }
        for method, pictures in given.items():
            path = results.mesh(method, name)
            made = render(load_mesh(path), orbit(4), 2 * SIZE) if path.exists() else [EMPTY] * 4
            rows[method].append([*pictures, *made, *render(truth, orbit(4), 2 * SIZE)])
    for method, sheet in rows.items():
        harness.save_sheet(sheet, args.folder / f"val-{method}.png", SIZE, colors=192, gap=2)


if __name__ == "__main__":
    main()
