"""A folder as one file in the original layout of Stable Diffusion 2, and such files as folders. Names of tensors: `ldm`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

import one2345pp

from ..errors import InputError
from .folders import Folder, check_new, written_whole
from .ldm import CLASSES, from_ldm, to_ldm
from .weights import fill, read_metadata, read_tensors, weight_files


METADATA_KEY = "one2345pp"
SMALL_SUFFIXES = (".json", ".txt")
SMALL_NAME = re.compile(r"(\w[\w-]*/)?\w[\w.-]*\.(json|txt)")


def file_from_folder(folder: Path, output: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a pipeline's folder as one safetensors file.

    UNet, autoencoder and text encoder have the names of the original Stable Diffusion 2. Other networks, such as the vision encoder,
    keep their own names behind that of the component. Configs and the tokenizer are texts beside the tensors, so that
    `folder_from_file` needs nothing else.

    Args:
        folder: Folder of a first stage, of Stable Diffusion 2 or of a whole chain.
        output: File to write, `.safetensors`.
        dtype: Of the stored weights; as in the folder when not given.
    """
    output = Path(output)
    if output.suffix.lower() != ".safetensors":
        raise InputError(f"{output}: got {output.suffix!r}, expected a name that ends with .safetensors.")
    check_new(output)
    source = Folder.open(folder, **CLASSES)
    source.check_whole()
    for name in source.components:
        if name not in source.models and weight_files(source.path / name):
            raise InputError(
                f"{folder}: {name} is a {source.index[name][1]}, which one file cannot hold. Pass a folder without it."
            )
    models = {name: source.load(name, dtype) for name in source.models}
    tensors = to_ldm(models)
    for name in models.keys() - CLASSES.keys():
        tensors |= {f"{name}.{key}": tensor for key, tensor in models[name].state_dict().items()}
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(_small_files(source))}
    with written_whole(output) as partial:
        save_file(tensors, partial, metadata=metadata)


def folder_from_file(file: Path, output: Path, *, like: Path | None = None, dtype: torch.dtype | None = None) -> None:
    """Write the folder of a checkpoint that is one file.

    Args:
        file: `.safetensors` or `.ckpt`, in the original layout of Stable Diffusion 2.
        output: Folder to write, of the kind that `like` is.
        like: Folder whose configs, tokenizer and whatever the file does not hold are taken; it needs no weights of the networks
            that the file does hold. A file of `file_from_folder` needs none.
        dtype: Of the stored weights; as in the file when not given.
    """
    check_new(output)
    checkpoint = read_tensors(file)
    with _base(Path(file), like) as base:
        models = {name: base.empty(name) for name in CLASSES}
        try:
            weights = from_ldm(checkpoint, models)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        for name in CLASSES:
            fill(models[name], weights[name], f"{file}: {name}", dtype)
        for name in base.models.keys() - CLASSES.keys():
            own = {key.removeprefix(f"{name}."): t for key, t in checkpoint.items() if key.startswith(f"{name}.")}
            if own or like is None:
                models[name] = fill(base.empty(name), own, f"{file}: {name}", dtype)
        base.write(models | base.others(models, dtype), output)


def _small_files(folder: Folder) -> dict[str, str]:
    """Texts of a folder that are not weights and not code, by path."""
    paths = [folder.path / "model_index.json"]
    for name in folder.components:
        paths += sorted(path for path in (folder.path / name).iterdir() if path.suffix in SMALL_SUFFIXES)
    return {
        path.relative_to(folder.path).as_posix(): path.read_bytes().decode("utf-8")
        for path in paths
        if not path.name.endswith(".index.json")  # of weights in several files
    }


@contextmanager
def _base(file: Path, like: Path | None) -> Iterator[Folder]:
    """The folder that says what the networks of a file are shaped like."""
    if like is not None:
        yield Folder.open(like, **CLASSES)
        return
    texts = read_metadata(file).get(METADATA_KEY)
    if texts is None:
        raise InputError(
            f"{file}: holds no configs and no tokenizer. Pass --like FOLDER, a folder of the same architecture (Stable Diffusion 2 in "
            "diffusers' form, its weights need not be there)."
        )
    with tempfile.TemporaryDirectory() as place:
        for name, text in _texts(file, texts).items():
            path = Path(place) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode("utf-8"))
        try:
            base = Folder.open(Path(place), **CLASSES)
            pipeline = getattr(one2345pp, base.class_name) if base.class_name in one2345pp.MODULE_OF else None
            if isinstance(base.index.get("_class_name"), list) and hasattr(pipeline, "write_shims"):
                pipeline.write_shims(Path(place))  # code is written anew, never taken from a file
            yield base
        except InputError as error:
            raise InputError(str(error).replace(place, str(file))) from None  # the place is nothing the person knows


def _texts(file: Path, encoded: str) -> dict[str, str]:
    """The texts beside the tensors; refuses names that would lead out of the folder."""
    try:
        texts = json.loads(encoded)
        wrong = [name for name in texts if not SMALL_NAME.fullmatch(name) or not isinstance(texts[name], str)]
    except (ValueError, TypeError, AttributeError):
        wrong = ["no list of files"]
    if wrong:
        raise InputError(
            f"{file}: its texts are not those of a folder ({wrong[0]!r}). Pass --like FOLDER to use others."
        )
    return texts
