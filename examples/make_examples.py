"""Draw the example pictures: procedural objects seen from a little above the front. Run: python examples/make_examples.py"""

from pathlib import Path

from PIL import Image

from one2345pp.data.shapes import shape
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.render import render
from one2345pp.pipelines.preprocess import frame_object


NAMES = ("mug", "chair", "mushroom", "rocket")
ELEVATION, FOV, DISTANCE, SIZE = 15.0, 0.7, 1.6, 512


def main() -> None:
    """Write `NAME.png` beside this file."""
    rig = CameraRig.from_angles([0], ELEVATION, FOV, DISTANCE)
    for name in NAMES:
        picture = Image.fromarray(render(shape(name), rig, SIZE)[0])
        frame_object(picture).save(Path(__file__).with_name(f"{name}.png"), optimize=True)


if __name__ == "__main__":
    main()
