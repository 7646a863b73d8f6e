"""Which of several tries at one picture is the best, told without the truth."""

# B pictures, N tries each, V views

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.picture_fit import PictureFit, fit_picture, outline_overlap
from .pipeline_output import SparseVolumePipelineOutput


def best_candidates(
    solids: list[SparseVolumePipelineOutput | InputError],  # [B N]
    views: list[list[Image.Image]],  # [B N][V]
    rig: CameraRig,  # [V]
    images: list[Image.Image],  # [B]
    elevations: list[float | None],  # [B]
) -> tuple[list[int], list[PictureFit]]:
    """For each picture the index of its best candidate, and how the picture looks at that one.

    A mesh is as good as its outlines agree with the views that it was made from, and its front with the picture: the mean of their
    intersections over union. Views that do not fit each other leave no mesh that fits them all.

    Args:
        solids: What the volume stage made of each picture's candidates, one picture after another; or the error that it raised.
        views: What it made them from, `RGBA`.
        rig: Their cameras.
        images: The pictures, `RGBA`.
        elevations: Degrees above the horizon from which each looks, if known.

    Raises:
        InputError: That of a picture's first candidate, if none of its candidates has a mesh.
    """
    count = len(solids) // len(images)
    kept, fits = [], []
    for first, picture, elevation in zip(range(0, len(solids), count), images, elevations, strict=True):
        found: dict[int, tuple[float, PictureFit]] = {}
        for index in range(first, first + count):
            if isinstance(solids[index], InputError):
                continue
            mesh = solids[index].meshes[0]
            fit = fit_picture(mesh, picture, elevation)
            score = float(np.mean([*outline_overlap(mesh, views[index], rig), fit.likeness]))
            found[index] = score, fit
        if not found:
            raise solids[first]
        best = max(found, key=lambda index: found[index][0])
        kept.append(best)
        fits.append(found[best][1])
    return kept, fits
