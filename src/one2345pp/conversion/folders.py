"""Folders of components as diffusers saves them: what is in them, and new ones written whole. One network's weights: `weights`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

import one2345pp

from ..errors import InputError
from ..pipelines.hub import names_class
from .weights import empty_model, load_model, read_checkpoint_json


WEIGHT_NAMES = ("*.safetensors", "*.bin", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.index.json")
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


@dataclass(frozen=True)
class Folder:
    """A folder with a `model_index.json`."""

    path: Path
    index: dict

    @classmethod
    def open(cls, path: Path, **needed: str) -> Folder:
        """Read the index.

        Args:
            path: The folder.
            needed: Components that have to be there, and the class of each.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such folder. Pass a pipeline's folder that is on this machine.")
        folder = cls(path, read_checkpoint_json(path / "model_index.json"))
        for name in folder.index:
            if not re.fullmatch(r"\w+", name):  # it becomes the name of a folder
                raise InputError(
                    f"{path}: its model_index.json names {name!r}, which is no component. Download it again."
                )
        for name, class_name in needed.items():
            entry = folder.index.get(name)
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if found is None or found.removesuffix("Fast") != class_name:
                raise InputError(
                    f"{path}: {name} is {found or 'not there'}, expected {class_name}. Pass the folder of a pipeline that has one."
                )
        return folder

    @property
    def class_name(self) -> str:
        """The pipeline's class."""
        name = self.index.get("_class_name", "DiffusionPipeline")
        return name[-1] if isinstance(name, list) else name

    @property
    def components(self) -> list[str]:
        """Names of what the index says is there."""
        return [name for name, entry in self.index.items() if names_class(entry) and not name.startswith("_")]

    @property
    def models(self) -> dict[str, type[nn.Module]]:
        """Components with weights, and their classes."""
        classes = {name: _class_of(*self.index[name]) for name in self.components}
        return {name: cls for name, cls in classes.items() if cls is not None and _is_model(cls)}

    def load(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        """A network with its weights."""
        return load_model(self.models[name], self.path / name, dtype)

    def empty(self, name: str) -> nn.Module:
        """A network without weights."""
        return empty_model(self.models[name], self.path / name)

    def others(self, models: Container[str], dtype: torch.dtype | None) -> dict[str, nn.Module]:
        """Networks beside `models` that have to be written in another dtype. Every one is read, so that none is not whole."""
        loaded = {}
        for name in self.models:
            if name not in models:
                model = self.load(name, dtype)
                loaded |= {} if dtype is None else {name: model}
        return loaded

    def check_whole(self) -> None:
        """Refuse a folder without the folder of one of its components."""
        for name in self.components:
            if not (self.path / name).is_dir():
                raise InputError(
                    f"{self.path}: model_index.json names {name}, which is not there. Complete the folder."
                )

    def write(self, models: dict[str, nn.Module], output: Path) -> None:
        """A folder like this one with other weights in it: everything but those, and but a model card, is copied as it is.

        Args:
            models: Networks whose weights are written anew, by component.
            output: Folder to write; it appears when it is whole.
        """
        self.check_whole()
        with written_whole(output) as partial:
            for name, model in models.items():
                model.save_pretrained(str(partial / name))
            for file in ("model_index.json", "pipeline.py"):
                if (self.path / file).is_file():
                    partial.mkdir(exist_ok=True)
                    shutil.copyfile(self.path / file, partial / file)
            for source in sorted(path for path in self.path.iterdir() if path.is_dir()):
                if re.sub(r"_\d+$", "", source.name) in self.components or source.name in self.components:
                    ignored = shutil.ignore_patterns(*(WEIGHT_NAMES if source.name in models else ()), ".*", "__*")
                    shutil.copytree(source, partial / source.name, ignore=ignored, dirs_exist_ok=True)


def check_new(output: Path) -> None:
    """Refuse an output that is there already, or that could not be written."""
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: exists already and is not replaced. Choose another name, or remove it first.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} does not exist. Create it first.")
    if not os.access(output.absolute().parent, os.W_OK):
        raise InputError(f"{output}: the folder {output.parent} is not writable. Choose another.")


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A temporary name to write under; it becomes `output` when all went well, and is removed when not."""
    output = Path(output)
    check_new(output)
    partial = output.with_name(output.name + ".part")
    _remove(partial)
    try:
        yield partial
        partial.rename(output)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_model(cls: type) -> bool:
    """Whether it has weights and one config; several ControlNets together have no config of their own."""
    return issubclass(cls, nn.Module) and (hasattr(cls, "load_config") or hasattr(cls, "config_class"))


def _class_of(library: str, class_name: str) -> type | None:
    """A component's class, if it is one of diffusers, transformers or this package; nothing else is imported."""
    if library in LIBRARIES:
        return getattr(LIBRARIES[library], class_name, None)
    if library == f"one2345pp.{one2345pp.MODULE_OF.get(class_name)}":
        return getattr(one2345pp, class_name)
    return None
