"""Reading JSON objects, and tables in CSV, with errors for the person who passed the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
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


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a heading.

    Raises:
        InputError: If the file cannot be read, or lacks one of the columns, in its heading or in a row.
    """
    hint = f"Pass a CSV with the columns {', '.join(columns)}."
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
            reader = csv.DictReader(file)
            heading, rows = reader.fieldnames or [], list(reader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {hint}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a CSV file ({error}). {hint}") from None
    if missing := [name for name in columns if name not in heading]:
        raise InputError(f"{path}: has no column {', '.join(missing)}. {hint}")
    for number, row in enumerate(rows, 1):
        if None in [row[name] for name in columns]:
            raise InputError(f"{path}: row {number} ends before the last of its columns. {hint}")
    return rows
