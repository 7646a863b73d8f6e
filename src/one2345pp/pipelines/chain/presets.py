"""Settings that suit the views of a first stage, by what the stage is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


FULL_SIZE = 256  # pixels of a view, from which a first stage is taken for one like Zero123++

# Views of a full-size first stage agree like true ones. So the volume stage takes its settings for true views; the outline of the
# picture, whose place beside the views is a guess, would spoil them; and one try costs minutes, not a second.
LIKE_TRUE_VIEWS: dict[str, Any] = {}
ONE_TRY = {"num_candidates": 1, "shapes_volume": False}


def suited_to(multiview: Any, guide: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of a chain that are others for a first stage; `guide` is the chain's `guide_config`, of which the rest stays."""
    config = getattr(multiview, "config", None)
    if config is None or config.get("view_size", 0) < FULL_SIZE:
        return {}
    return {"drawn_volume_config": LIKE_TRUE_VIEWS, "guide_config": None if guide is None else {**guide, **ONE_TRY}}
