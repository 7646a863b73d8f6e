"""Whether a mesh agrees with the views that it was made from: what contradicts them is not handed over in silence."""

# V views

from __future__ import annotations

import logging

import trimesh
from PIL import Image

from ...geometry.picture_fit import outline_overlap
from ...geometry.views import Views


logger = logging.getLogger(__name__)

LEAST = (
    0.7  # mean overlap of outlines; views of `val` objects have 0.80 and more, in the wrong order mostly 0.5 to 0.67
)
SIZE = 128  # pixels in which outlines are compared


def tell_disagreement(mesh: trimesh.Trimesh, views: Views) -> None:
    """Log a warning where the outlines of a mesh, seen by the cameras of its views, overlap little with the masks of these.

    Args:
        mesh: What was made of the views.
        views: Square `RGBA` pictures and their cameras.
    """
    overlap = outline_overlap(mesh, [view.resize((SIZE, SIZE), Image.Resampling.BOX) for view in views], views.rig)
    if overlap.mean() >= LEAST:
        return
    worst = ", ".join(str(number + 1) for number in sorted(overlap.argsort()[: max(1, len(views) // 3)]))
    logger.warning(
        "views: the mesh agrees with only %.0f%% of what its views show, least in number %s. Check that the pictures are in the "
        "order of their cameras, that these are of this world (+Y up, front +Z), and that each object is cut out whole.",
        100 * overlap.mean(),
        worst,
    )
