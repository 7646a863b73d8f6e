"""Where the checkpoint that ships inside the package is. Loading it is the pipelines' business."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError


def default_checkpoint() -> Path:
    """Folder of the checkpoint in the package: small, trained by this project's own recipe, enough to run without a download.

    Raises:
        InputError: If the installation lacks it.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: the default checkpoint is missing. Reinstall one2345pp, or pass another model.")
    return folder
