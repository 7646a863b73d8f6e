"""The one reader of training configs: a section becomes a frozen dataclass, whose fields are its keys and say what they are for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from inspect import signature
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InputError


Settings = TypeVar("Settings")
HINT = "Start from one of the files in configs/."


def read(cls: type[Settings], section: Any, name: str = "config", elsewhere: Collection[str] = ()) -> Settings:
    """A section of a config as the dataclass `cls`.

    Args:
        cls: Its fields are the keys, their types what values may be: plain types, `Literal`, unions, tuples (lists in JSON), and for
            sections inside dataclasses, or `dict[str, a dataclass]` where their names are free.
        section: As it stands in the JSON.
        name: What errors call it.
        elsewhere: Keys of the section that somebody else reads.

    Raises:
        InputError: If the section has unknown keys, lacks some, or a value is of another type.
    """
    if not isinstance(section, dict):
        raise InputError(f"{name}: got {section!r}, expected a section of keys and values. {HINT}")
    known, types = {field.name: field for field in fields(cls)}, get_type_hints(cls)
    check_keys(section, [*known, *elsewhere], name)
    needed = [key for key, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    if missing := [key for key in needed if key not in section]:
        raise InputError(f"{name}: lacks {', '.join(missing)}. {HINT}")
    return cls(**{key: _value(types[key], section[key], f"{name}.{key}") for key in known if key in section})


def check_keys(section: Collection[str], known: Collection[str], name: str) -> None:
    """Raise `InputError` if a section has keys that are not known, with the known ones that are nearest."""
    if unknown := sorted(set(section) - set(known)):
        near = [match for key in unknown for match in get_close_matches(key, known, 1)]
        guess = f" Did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"{name}: has unknown keys {', '.join(unknown)}.{guess} Known: {', '.join(sorted(known))}.")


def arguments_of(cls: type) -> list[str]:
    """Names of the arguments that a class is made with."""
    return list(signature(cls).parameters)


def _value(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        return read(hint, value, name)
    if get_origin(hint) is dict and is_dataclass(inner := get_args(hint)[1]):
        if not isinstance(value, dict):
            raise InputError(f"{name}: got {value!r}, expected sections by their names. {HINT}")
        return {key: read(inner, section, f"{name}.{key}") for key, section in value.items()}
    if not _fits(value, hint):
        raise InputError(f"{name}: got {value!r}, expected {_words(hint)}.")
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _words(hint: Any) -> str:
    """What a value may be, for people."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple:
        return f"a list of {len(inner)} numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
