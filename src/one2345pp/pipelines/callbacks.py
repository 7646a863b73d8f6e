"""One form for callbacks at the end of steps, the form of diffusers, for every pipeline of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import InputError


def tensor_names(callback: Callable | None, names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Which tensors a callback gets: those named, else those that it names itself, as diffusers' `PipelineCallback`s do, else the
    first that the pipeline knows.

    Raises:
        InputError: If the pipeline does not have one of them.
    """
    if names is None:
        names = getattr(callback, "tensor_inputs", known[:1])
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"callback_on_step_end_tensor_inputs: got {unknown}, expected some of {list(known)}.")
    return list(names)


def end_step(
    pipe: DiffusionPipeline,
    callback: Callable[[Any, int, int, dict], dict] | None,
    names: Sequence[str],
    step: int,
    timestep,
    tensors: Mapping[str, Any],
) -> dict[str, Any]:
    """Call `callback(pipe, step, timestep, {name: tensor})`, and return the tensors with those that it gave back in their place."""
    if callback is None:
        return dict(tensors)
    changed = callback(pipe, step, timestep, {name: tensors[name] for name in names}) or {}
    return {name: changed.get(name, tensor) for name, tensor in tensors.items()}
