"""Names and limits that callers choose from, spelled once, where nothing heavy is imported."""

from __future__ import annotations

import math


# Six views each. Azimuth relative to the input view, elevation absolute, both in degrees; field of view in degrees.
RIGS = {
    "zero123plus-v1.2": {"azimuths": (30, 90, 150, 210, 270, 330), "elevations": (20, -10) * 3, "fov": 30.0},
    "zero123plus-v1.1": {
        "azimuths": (30, 90, 150, 210, 270, 330),
        "elevations": (30, -20) * 3,
        "fov": math.degrees(2 * math.atan(16 / 35)),
    },
}
# Public first stages by short name, and the licences of weights that are not free for every use.
FIRST_STAGES = {"zero123plus-v1.2": "sudo-ai/zero123plus-v1.2", "zero123plus-v1.1": "sudo-ai/zero123plus-v1.1"}
LICENCES = dict.fromkeys(FIRST_STAGES.values(), "weights under CC-BY-NC 4.0, for uses that are not commercial")
BACKGROUNDS = ("auto", "alpha", "key", "rembg")  # how an object is told from its background
SHADINGS = ("soft", "none", "normal", "wireframe")  # of renders
TEXTURE_SIZES = (16, 16384)  # pixels along a side, least and most
