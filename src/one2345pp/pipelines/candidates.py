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
    elevation: float | None,
) -> tuple[list[int], list[PictureFit]]:
    """For each picture the index of its best candidate, and how the picture looks at that one.

    A mesh is as good as its outlines agree with the views that it was made from, and its front with the picture: the mean of their
    intersections over union. Views that do not fit each other leave no mesh that fits them all.

    Args:
        solids: What the volume stage made of each picture's candidates, one picture after another; or the error that it raised.
        views: What it made them from, `RGBA`.
        rig: Their cameras.
        images: The pictures, `RGBA`.
        elevation: Degrees above the horizon from which they look, if known.

    Raises:
        InputError: That of a picture's first candidate, if none of its candidates has a mesh.
    """
    count = len(solids) // len(images)
    kept, fits = [], []
    for first, picture in zip(range(0, len(solids), count), images, strict=True):
        scores: dict[int, float] = {}
        found: dict[int, PictureFit] = {}
        for index in range(first, first + count):
            if isinstance(solids[index], InputError):
                continue
            mesh = solids[index].meshes[0]
            found[index] = fit_picture(mesh, picture, elevation)
            overlaps = outline_overlap(mesh, views[index], rig)
            scores[index] = float(np.mean([*overlaps, found[index].likeness]))
        if not found:
            raise solids[first]
        kept.append(max(scores, key=scores.get))
        fits.append(found[kept[-1]])
    return kept, fits
