"""Reading JSON objects, with errors for the person who passed the file."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import InputError


def read_json(path: Path, hint: str) -> dict:
    """The JSON object in a file; `hint` says how to mend what is missing or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is not a JSON file ({error}). {hint}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object. {hint}")
    return content
