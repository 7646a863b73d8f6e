"""What calls of all pipelines may be given: counts, and sources of random draws."""

from __future__ import annotations

import torch

from ..errors import InputError


def check_counts(**counts: int | None) -> None:
    """At least one of everything; `None` stands for a default."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name}: got {count}, expected at least 1.")


def check_generators(generator, number: int, each: str) -> None:
    """One source of random draws, or a list of one `each`."""
    several = isinstance(generator, list)
    if several and len(generator) != number:
        raise InputError(f"generator: got {len(generator)}, expected one, or a list of {number}, one {each}.")
    for one in generator if several else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise InputError(f"generator: got {type(one).__name__}, expected a torch.Generator, or a list of them.")
