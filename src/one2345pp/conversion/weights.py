"""Weights of one network: reading files of tensors, checked against what the network expects. Folders of several live in `folders`."""

from __future__ import annotations

import functools
import pickle
import re
import zipfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError
from ..files import read_json


PICKLES = (".ckpt", ".bin", ".pt", ".pth")
WEIGHT_FILE = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?\.(safetensors|bin)")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# --- files ----------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, on the CPU. What `state_dict` holds, if there is such a key.

    Args:
        path: `.safetensors`, or a pickle of PyTorch (`.ckpt`, `.bin`, `.pt`, `.pth`), of which nothing but tensors is loaded.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{path}: no such file. Pass a .safetensors or .ckpt file of weights.")
    if suffix != ".safetensors" and suffix not in PICKLES:
        raise InputError(f"{path}: got {path.suffix!r}, expected .safetensors, {', '.join(PICKLES)}.")
    try:
        if suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, or none, and is not run to find out. Save its tensors as .safetensors in an "
            "environment where you trust the file."
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: is not a whole file of weights ({reason}). Download it again.") from error
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise InputError(f"{path}: has no tensors by name, expected the state dict of a network.")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Texts that a safetensors file has beside its tensors; none of other files."""
    if Path(path).suffix.lower() != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def weight_files(folder: Path) -> list[Path]:
    """Files that `from_pretrained(folder)` reads; safetensors go first, variants such as fp16 do not count."""
    files = sorted(path for path in Path(folder).glob("*") if WEIGHT_FILE.fullmatch(path.name))
    return [path for path in files if path.suffix == ".safetensors"] or files


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a component's weights on disk; one that can hold all of them, if they differ."""
    files = weight_files(folder)
    if not files:
        raise InputError(
            f"{folder}: has no weights, expected safetensors or .bin files as save_pretrained writes them. Complete the folder; "
            "files of a variant such as fp16 are read when that part of their name is removed."
        )
    dtypes = set()
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                dtypes |= {FLOATS.get(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
        else:
            dtypes |= {tensor.dtype for tensor in read_tensors(path).values() if tensor.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes - {None}) if dtypes - {None} else torch.float32


# --- networks -------------------------------------------------------------------------------------------------------


def load_model(cls: type[nn.Module], folder: Path, dtype: torch.dtype | None = None, **kwargs) -> nn.Module:
    """A network from its folder, every weight of it there and of the right size.

    Args:
        cls: A model class of diffusers, transformers or this package.
        folder: Its folder, with `config.json` and weights.
        dtype: Of the weights in memory; as they are on disk when not given.
        kwargs: More for `from_pretrained`.
    """
    folder, dtype = Path(folder), dtype or stored_dtype(folder)
    try:
        model, found = cls.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, local_files_only=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: does not load as {cls.__name__} ({reason}). Its config.json and weights have to be of one network."
        ) from error
    for what in ("missing_keys", "mismatched_keys"):
        if found[what]:
            raise InputError(
                f"{folder}: {len(found[what])} {what.replace('_', ' ')}, such as {sorted(map(str, found[what]))[0]}, for the "
                f"{cls.__name__} that its config.json describes. Complete the folder."
            )
    return model.eval()


def empty_model(cls: type[nn.Module], folder: Path) -> nn.Module:
    """The network that a folder's `config.json` describes, without weights (on the meta device)."""
    read_checkpoint_json(Path(folder) / "config.json")  # says what is wrong better than the libraries
    try:
        with init_empty_weights(include_buffers=False):
            if issubclass(cls, ModelMixin):
                return cls.from_config(cls.load_config(str(folder), local_files_only=True)).eval()
            return cls(cls.config_class.from_pretrained(str(folder), local_files_only=True)).eval()
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{folder}: its config.json is none of a {cls.__name__} ({reason}). Download it again."
        ) from error


def fill(model: nn.Module, weights: dict[str, Tensor], source: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Give an empty model its weights, every one of them and no other.

    Args:
        model: From `empty_model`.
        weights: By the names of the model. They are not copied.
        source: Where they are from, for messages.
        dtype: Of the weights afterwards; as they are when not given.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kind = type(model).__name__
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        lists = ((missing, "lacks"), (unknown, "has more than expected:"))
        counts = "; ".join(f"{word} {len(names)} tensors, such as {names[0]}" for names, word in lists if names)
        raise InputError(
            f"{source}: does not fit the {kind} of {len(expected)} tensors that is expected ({counts}). Its architecture differs, or "
            "it is not whole: pass weights and a folder of the same network."
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise InputError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, expected {shape} for the {kind}. Pass weights and a folder "
                "of the same network."
            )
    model.load_state_dict(weights, assign=True)
    return model if dtype is None else model.to(dtype)


def read_checkpoint_json(path: Path) -> dict:
    """A JSON object of a checkpoint."""
    return read_json(path, "Pass a whole folder that save_pretrained wrote.")
