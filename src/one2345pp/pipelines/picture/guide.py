"""What the input picture adds to the paper's chain: one object a picture, asked at four places. None of it is in the paper.

How pictures, meshes and volumes are laid over each other lives in `geometry` (`placement`, `outline`, `picture_fit`).
"""

# V views, B pictures

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image

from ...errors import InputError
from ...geometry.framing import frame_object
from ...geometry.outline import fit_outline
from ...geometry.picture_fit import PictureFit, fit_picture, outline_overlap, stretch
from ...geometry.placement import place_picture
from ...geometry.views import Views
from ...models.elevation import ElevationEstimator
from ..roles import Solid


@dataclass(frozen=True)
class GuideSettings:
    """Numbers of the guide, a chain's `guide_config`. What was measured for each: docs/experiments.md.

    Args:
        num_candidates: So many times views are drawn and reconstructed where a call does not say; the guide keeps the best.
        shapes_volume: Whether a picture of known elevation is one more view of the volume, and the volume takes its outline. How large
            the object is beside the views is a guess: views like true ones do better without.
        texture_trust: How much the picture counts in the texture, against 1 of a drawn view.
        stretch_limit: Most that a side of the mesh is stretched or shrunk to the proportions of a picture of known elevation.
    """

    num_candidates: int = 1
    shapes_volume: bool = False
    texture_trust: float = 8.0
    stretch_limit: float = 1.25

    def __post_init__(self):
        if not isinstance(self.num_candidates, int) or self.num_candidates < 1:
            raise InputError(f"num_candidates: got {self.num_candidates!r}, expected a whole number of at least 1.")
        for name, least in (("texture_trust", 0.0), ("stretch_limit", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, Real) or value < least or value == 0:
                raise InputError(
                    f"{name}: got {value!r}, expected a positive number{f' of at least {least:g}' * (least > 0)}."
                )

    @classmethod
    def of(cls, settings: GuideSettings | Mapping[str, Any]) -> GuideSettings:
        """Settings as they are, or from a dictionary of some of them."""
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, Mapping):
            raise InputError(
                f"guide: got {type(settings).__name__}, expected GuideSettings, a dictionary of some, or None."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise InputError(f"guide_config: got {unknown}, expected some of {', '.join(known)}.")
        return cls(**settings)


@dataclass
class Candidate:
    """One try at an object: the views, what was made of them, and how the picture looks at that."""

    views: Views
    solid: Solid
    fit: PictureFit | None = None
    score: float = 0.0


class PictureGuide:
    """One picture that an object is made from, and what it says about the object.

    Args:
        picture: `RGBA`, the object centred in a square.
        elevation: Degrees above the horizon from which the picture looks, if known.
        settings: See `GuideSettings`.
    """

    def __init__(self, picture: Image.Image, elevation: float | None, settings: GuideSettings):
        self.picture, self.elevation, self.settings = picture, elevation, settings

    # --- 1. before the views are reconstructed ------------------------------------------------------------------

    def add_view(self, views: Views) -> Views:
        """The views, and if the guide shapes the volume the picture as one more."""
        return views if self._placed(views) is None else views + self._placed(views)

    # --- 2. before a mesh is made of the volume -----------------------------------------------------------------

    def shape(self, solid: Solid, views: Views) -> Solid:
        """The solid of these views with the picture's outline, if it has a volume and the guide shapes it."""
        placed = self._placed(views)
        if placed is None or solid.volume is None:
            return solid
        return Solid(volume=fit_outline(solid.volume, placed[0], placed.rig))

    # --- 3. when one candidate is kept --------------------------------------------------------------------------

    def judge(self, candidate: Candidate) -> Candidate:
        """The candidate with its score and the picture laid over its front.

        A mesh is as good as its outlines agree with the views that it was made from, and its front with the picture: the mean of their
        intersections over union. Views that do not fit each other leave no mesh that fits them all.
        """
        mesh, views = candidate.solid.mesh, candidate.views
        fit = fit_picture(mesh, self.picture, self.elevation, self.settings.stretch_limit)
        agreement = outline_overlap(mesh, list(views), views.rig)
        score = float(np.mean([*agreement, fit.likeness]))
        return dataclasses.replace(candidate, fit=fit, score=score)

    # --- 4. when the mesh is painted and handed over ------------------------------------------------------------

    def texture_views(self, candidate: Candidate) -> tuple[Views, list[float]]:
        """The views and the picture, the only one that is no guess, and how much each counts."""
        picture = Views([candidate.fit.view], candidate.fit.camera)
        return candidate.views + picture, [1.0] * len(candidate.views) + [self.settings.texture_trust]

    def proportion(self, mesh: trimesh.Trimesh, candidate: Candidate) -> trimesh.Trimesh:
        """The mesh with the proportions that a picture of known elevation shows of its front."""
        return mesh if self.elevation is None else stretch(mesh, candidate.fit.factors)

    def _placed(self, views: Views) -> Views | None:
        """The picture as one more view beside those of a rig, if the guide shapes the volume by it."""
        if self.elevation is None or not self.settings.shapes_volume:
            return None
        picture, camera = place_picture(self.picture, views.rig, self.elevation)
        return Views([picture], camera)


def best_candidate(
    reconstruct: Callable[[Views], Solid], candidates: Sequence[Views], guide: PictureGuide | None
) -> Candidate:
    """The solid of each candidate's views, and of those the one with the highest score; without a guide the first.

    Raises:
        InputError: That of the first candidate, if none has a surface; one that fails does not stop the others.
    """
    found, first_error = [], None
    for views in candidates:
        try:
            if guide is None:
                found.append(Candidate(views, reconstruct(views).meshed()))
            else:
                solid = guide.shape(reconstruct(guide.add_view(views)), views)
                found.append(guide.judge(Candidate(views, solid.meshed())))
        except InputError as error:
            first_error = first_error or error
    if not found:
        raise first_error
    return max(found, key=lambda candidate: candidate.score)


def check_elevation(elevation: float | list[float | None] | None, number: int) -> None:
    """Refuse what is not an elevation in degrees, or a list of `number` of them, of which `None` is not known."""
    several = isinstance(elevation, list | tuple)
    if several and len(elevation) != number:
        raise InputError(f"elevation: got {len(elevation)}, expected one, or a list of {number}, one an object.")
    for degrees in elevation if several else [elevation]:
        if degrees is not None and not (isinstance(degrees, Real) and -90 <= degrees <= 90):
            raise InputError(f"elevation: got {degrees!r}, expected degrees from -90 to 90.")


def find_elevations(
    estimator: ElevationEstimator | None,
    pictures: list[Image.Image],  # [B] RGBA, square
    elevation: float | list[float | None] | None,
    device: torch.device,
) -> list[float | None]:
    """Degrees above the horizon from which each picture looks: as told, else as the estimator finds, else `None`, not known."""
    told = list(elevation) if isinstance(elevation, list | tuple) else [elevation] * len(pictures)
    if estimator is None:
        return told
    # one by one, so that a picture's does not depend on the others, not in the last bit
    return [
        _estimate(estimator, picture, device) if degrees is None else degrees
        for picture, degrees in zip(pictures, told, strict=True)
    ]


def _estimate(estimator: ElevationEstimator, picture: Image.Image, device: torch.device) -> float:
    framed = torch.from_numpy(np.array(frame_object(picture, estimator.config.image_size)))
    return estimator.estimate(framed[None].to(device).movedim(-1, 1).float() / 255).item()
