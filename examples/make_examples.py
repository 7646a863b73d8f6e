"""Draws the example pictures: procedural objects seen from a little above the front.

python examples/make_examples.py
"""

import argparse
from pathlib import Path

from PIL import Image

from one2345pp.data.shapes import shape
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.render import render


NAMES = ("mug", "chair", "mushroom", "rocket")
ELEVATION, FOV, DISTANCE, SIZE = 15.0, 0.7, 1.6, 512


def main(argv=None) -> None:
    """Write `NAME.png`, by default beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder")
    args = parser.parse_args(argv)
    rig = CameraRig.from_angles([0], ELEVATION, FOV, DISTANCE)
    for name in args.names:
        picture = Image.fromarray(render(shape(name), rig, SIZE)[0])
        frame_object(picture).save(args.output / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
