"""Tries at one picture: what is made of the views that were drawn of it, and which try is the best, told without the truth."""

# N tries at one picture, V views each

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..geometry.extract import volume_to_mesh
from ..geometry.outline import fit_outline
from ..geometry.picture_fit import PictureFit, fit_picture, outline_overlap
from ..geometry.placement import place_picture
from ..models.condition_encoder import DRAWN, PICTURE
from .pipeline_output import SparseVolumePipelineOutput
from .pipeline_sparse_volume import SparseVolumeDiffusionPipeline


def reconstruct_best(
    volume: SparseVolumeDiffusionPipeline,
    candidates: list[list[Image.Image]],  # [N][V]
    rig: CameraRig,  # [V]
    picture: Image.Image,
    elevation: float | None,
    *,
    believe_picture: bool,
    tell_kinds: bool,
    **options,
) -> tuple[SparseVolumePipelineOutput, list[Image.Image], PictureFit]:
    """Volume and mesh of each candidate's views, and of those the best with its views and its `PictureFit`, see `best_candidate`.

    Args:
        volume: The volume stage, with the settings for drawn views.
        candidates: `RGBA` views, as the first stage drew them.
        rig: Their cameras.
        picture: What they were drawn of, `RGBA`, square.
        elevation: Degrees above the horizon from which it looks, if known.
        believe_picture: Whether a picture of known elevation shapes the volume, see `reconstruct_drawn`.
        tell_kinds, options: Of `reconstruct_drawn`.

    Raises:
        InputError: That of the first candidate, if none has a mesh; one that fails does not stop the others.
    """
    believed, solids = elevation if believe_picture else None, []
    for views in candidates:
        try:
            solids.append(reconstruct_drawn(volume, views, rig, picture, believed, tell_kinds, **options))
        except InputError as error:
            solids.append(error)
    best, fit = best_candidate(solids, candidates, rig, picture, elevation)
    return solids[best], candidates[best], fit


def reconstruct_drawn(
    volume: SparseVolumeDiffusionPipeline,
    views: list[Image.Image],  # [V]
    rig: CameraRig,  # [V]
    picture: Image.Image,
    elevation: float | None,
    tell_kinds: bool,
    **options,
) -> SparseVolumePipelineOutput:
    """Volume and mesh of drawn views and, if it can be placed, the picture that they were drawn of.

    Args:
        volume: The volume stage, with the settings for drawn views.
        views: `RGBA`, as the first stage drew them.
        rig: Their cameras.
        picture: `RGBA`, square.
        elevation: Degrees above the horizon from which the picture looks. Told, it is one more view, and the volume takes its outline.
        tell_kinds: Tell the volume stage what each view is.
        options: Others of its call.

    Raises:
        InputError: If no surface is found.
    """
    pictures, cameras, kinds = views, rig, [DRAWN] * len(views)
    if elevation is not None:
        placed, camera = place_picture(picture, rig, elevation)
        pictures, cameras, kinds = [*views, placed], CameraRig.cat([rig, camera]), [*kinds, PICTURE]
    told = kinds if tell_kinds else None
    solid = volume(pictures, cameras=cameras, image=picture, kinds=told, output_type="volume", **options).volumes[0]
    if elevation is not None:
        solid = fit_outline(solid, placed, camera)
    return SparseVolumePipelineOutput([solid], [volume_to_mesh(solid)])


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
