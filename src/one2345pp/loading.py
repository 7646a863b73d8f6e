"""Models for the commands: which one is meant, on which device, with which parts swapped. What commands do lives in `commands`."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoints import default_checkpoint
from .errors import InputError
from .names import FIRST_STAGES


if TYPE_CHECKING:
    import torch

    from .pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline


HUB_ID = r"[\w.-]+/[\w.-]+"


def find_model(model: str | None, option: str = "--model") -> str:
    """Folder or Hub id of the model; refuses what can be neither."""
    if model is None:
        return str(default_checkpoint())
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise InputError(f"{option} {model}: has no model_index.json. Pass a folder that save_pretrained wrote.")
    elif not re.fullmatch(HUB_ID, model):
        raise InputError(f"{option} {model}: is neither a folder nor a Hub id (OWNER/NAME).")
    return model


@contextlib.contextmanager
def _loading(option: str, model: str) -> Iterator[None]:
    """What cannot be loaded is told in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        of_the_net = type(error).__module__.startswith(("httpx", "huggingface_hub"))
        if not (of_the_net or isinstance(error, OSError | ValueError)):
            raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{option} {model}: cannot be loaded ({reason})") from error


def find_multiview(model: str | None) -> str | None:
    """Folder or Hub id of another first stage, if one is asked for, by its short name, too."""
    return None if model is None else find_model(FIRST_STAGES.get(model, model), "--multiview")


def load_pipeline(model: str, args: argparse.Namespace, multiview: str | None = None) -> One2345PlusPlusPipeline:
    """The chain on the device that was asked for, with another first stage if one is."""
    device, scheduler = find_device(args.device), getattr(args, "scheduler", None)
    loras = [_read_lora(text) for text in getattr(args, "lora", None) or []]
    if getattr(args, "offload", None) is not None and device == "cpu":
        raise InputError("--offload: moves models to a GPU and back, and there is none. Leave it out.")
    hush(args)
    scheduler = None if scheduler is None else _scheduler(scheduler)
    from .pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline

    with _loading("--model", model if multiview is None else f"{model} --multiview {multiview}"):
        pipe = One2345PlusPlusPipeline.from_pretrained(model, multiview=multiview, dtype=dtype_of(args.dtype))
    pipe.set_progress_bar_config(disable=is_silent(args))
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    _load_loras(pipe, loras)
    if getattr(args, "offload", None) is None:
        return pipe.to(device)
    offload = pipe.enable_model_cpu_offload if args.offload == "model" else pipe.enable_sequential_cpu_offload
    offload(device=device)
    return pipe


def _scheduler(name: str) -> type:
    """A scheduler class of diffusers."""
    import diffusers

    found = getattr(diffusers, name, None)
    needed = ("from_config", "add_noise", "scale_model_input")  # and a first noise level, which flow matching lacks
    if not (
        isinstance(found, type)
        and issubclass(found, diffusers.SchedulerMixin)
        and all(hasattr(found, n) for n in needed)
    ):
        raise InputError(
            f"--scheduler {name}: diffusers has none of that name. Pass one such as UniPCMultistepScheduler."
        )
    return found


def _read_lora(text: str) -> tuple[str, float]:
    """File, folder or Hub id of LoRA weights, and how much they count, of `FILE` or `FILE:WEIGHT`."""
    file, _, weight = text.rpartition(":")
    try:
        file, weight = (file, float(weight)) if file else (text, 1.0)
    except ValueError:  # a colon of a path
        file, weight = text, 1.0
    if not Path(file).exists() and not re.fullmatch(HUB_ID, file):
        raise InputError(f"--lora {file}: is neither a file nor a folder, nor a Hub id (OWNER/NAME).")
    return file, weight


def _load_loras(pipe: One2345PlusPlusPipeline, loras: list[tuple[str, float]]) -> None:
    """LoRA weights for the views, one adapter each."""
    for number, (file, _) in enumerate(loras):
        with _loading("--lora", file):
            pipe.load_lora_weights(file, adapter_name=f"lora{number}")
    if loras:
        pipe.set_adapters([f"lora{number}" for number in range(len(loras))], [weight for _, weight in loras])


def load_text_to_image(args: argparse.Namespace):
    from diffusers import DiffusionPipeline

    with _loading("--text-to-image", args.text_to_image):
        pipe = DiffusionPipeline.from_pretrained(args.text_to_image, dtype=dtype_of(args.dtype))
    pipe.set_progress_bar_config(disable=is_silent(args))
    return pipe.to(find_device(args.device))


def find_device(name: str) -> str:
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    if not there[name]:
        raise InputError(f"--device {name}: this machine has none that PyTorch can use. Pass cpu or auto.")
    return name


def dtype_of(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)


def is_silent(args: argparse.Namespace) -> bool:
    """Whether progress bars would disturb, or have nowhere to go."""
    try:
        return args.quiet or not sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return True


def hush(args: argparse.Namespace) -> None:
    """Libraries may only speak of errors: warnings about their own future are nothing the person can mend."""
    warnings.simplefilter("ignore")
    import diffusers.utils.logging
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        if is_silent(args):
            logging.disable_progress_bar()
