"""Which of several tries at one picture is the best, told without the truth."""

# N tries at one picture, V views each

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.picture_fit import PictureFit, fit_picture, outline_overlap
from .pipeline_output import SparseVolumePipelineOutput


def best_candidate(
    solids: list[SparseVolumePipelineOutput | InputError],  # [N]
    views: list[list[Image.Image]],  # [N][V]
    rig: CameraRig,  # [V]
    picture: Image.Image,
    elevation: float | None,
) -> tuple[int, PictureFit]:
    """The index of a picture's best candidate, and how the picture looks at that one.

    A mesh is as good as its outlines agree with the views that it was made from, and its front with the picture: the mean of their
    intersections over union. Views that do not fit each other leave no mesh that fits them all.

    Args:
        solids: What the volume stage made of each candidate, or the error that it raised.
        views: What it made them from, `RGBA`.
        rig: Their cameras.
        picture: The picture, `RGBA`.
        elevation: Degrees above the horizon from which it looks, if known.

    Raises:
        InputError: That of the first candidate, if none has a mesh.
    """
    found: dict[int, tuple[float, PictureFit]] = {}
    for index, solid in enumerate(solids):
        if isinstance(solid, InputError):
            continue
        mesh = solid.meshes[0]
        fit = fit_picture(mesh, picture, elevation)
        score = float(np.mean([*outline_overlap(mesh, views[index], rig), fit.likeness]))
        found[index] = score, fit
    if not found:
        raise solids[0]
    best = max(found, key=lambda index: found[index][0])
    return best, found[best][1]
