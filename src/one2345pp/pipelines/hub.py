"""How a pipeline becomes a folder that any diffusers program can load, and back. What the pipelines compute lives elsewhere.

diffusers writes no code beside the weights and imports no library that a folder names. So `save_pretrained` adds `pipeline.py` and
one-line modules ("shims", named by the full path of the module they stand for), which `DiffusionPipeline.from_pretrained(folder,
trust_remote_code=True)` executes. Our own classes need none of that: they look their components up here, and execute nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo
from torch import nn

import one2345pp

from ..errors import InputError


__all__ = ["DiffusionPipeline", "ModelMixin", "SchedulerMixin", "SelfContainedMixin"]

PACKAGE = "one2345pp"
ALIGNMENT = 64  # bytes, of what PyTorch itself lays out on a CPU

COMPONENT_SHIM = '''"""Stands for {class_name} of the installed package one2345pp (pip install one2345pp)."""

from {module} import {class_name}


__all__ = ["{class_name}"]
'''

PIPELINE_SHIM = '''"""Stands for {class_name} of the installed package one2345pp (pip install one2345pp)."""

{imports}from {module} import {class_name}


__all__ = ["{class_name}"]
'''


def __getattr__(name: str):
    """The package's component classes by bare name: diffusers resolves components with `getattr(module, class_name)`."""
    if name not in one2345pp.MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(one2345pp, name)


def _align(model: nn.Module) -> None:
    """Copy weights that lie at odd places of memory, as those mapped from a file do.

    Kernels of a CPU round otherwise there, so that the same weights from another file would make another mesh.
    """
    for weight in (*model.parameters(), *model.buffers()):
        plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.device.type == "cpu"
        if plain and weight.is_floating_point() and weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()


def names_class(entry) -> bool:
    """Whether a value of `model_index.json` is a component, `[library, class]`, and not a setting that is a list of two."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        return False
    library, class_name = entry
    return class_name.isidentifier() and all(part.isidentifier() for part in library.split("."))


class CallLock:
    """A lock that the same thread may take again, and that copies and pickles as a new one."""

    def __init__(self):
        self.lock = threading.RLock()

    def __reduce__(self):
        return CallLock, ()


def one_at_a_time(call: Callable) -> Callable:
    """A pipeline's `__call__` for which others wait, of pipelines that share its networks and schedulers, too: the attention of a UNet
    and the steps of a scheduler are those of one running call."""

    @functools.wraps(call)
    def locked(self, *args, **kwargs):
        shared = [part for part in self.components.values() if isinstance(part, nn.Module | SchedulerMixin)]
        with contextlib.ExitStack() as held:
            for part in sorted(shared, key=id) + [self]:  # always in one order, so that nobody waits in a circle
                held.enter_context(vars(part).setdefault("_call_lock", CallLock()).lock)
            return call(self, *args, **kwargs)

    return locked


class SelfContainedMixin:
    """For subclasses of `DiffusionPipeline`: saved folders load in any diffusers program that has this package installed.

    Folders that were saved by these classes load through these classes without `trust_remote_code`. Threads may share a pipeline:
    their calls wait for each other.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = one_at_a_time(cls.__call__)

    # --- reading ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """As `DiffusionPipeline.from_pretrained`. Weights load as float32 unless `dtype` says otherwise."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """As `DiffusionPipeline.from_pipe`. The class of a stage takes it out of a chain, with the chain's settings for it."""
        stages = getattr(pipeline, "stages", {}).values()
        return super().from_pipe(next((stage for stage in stages if isinstance(stage, cls)), pipeline), **kwargs)

    def register_modules(self, **kwargs) -> None:
        """As `DiffusionPipeline.register_modules`, with weights where a CPU multiplies them alike, whichever file they are from."""
        for part in kwargs.values():
            if isinstance(part, nn.Module):
                _align(part)
        super().register_modules(**kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """As `ConfigMixin.load_config`, with this package's components pointed at this module instead of at the folder's shims."""
        outputs = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = outputs[0] if isinstance(outputs, tuple) else outputs
        known = inspect.signature(cls.__init__).parameters
        for name, entry in list(config.items()):
            if isinstance(entry, list) and len(entry) == 2 and _is_public(*entry):
                config[name] = [__name__, entry[1]]
            elif entry == [None, None] and name not in known:  # nothing, for another class: Zero123++'s safety_checker
                del config[name]
        return outputs

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """Read a config; `["pipeline", "Cls"]` becomes `"Cls"`, so that this class is used and not the folder's `pipeline.py`."""
        config = super()._dict_from_json_file(json_file)
        class_name = config.get("_class_name")
        if isinstance(class_name, list):
            if class_name[-1] in one2345pp.MODULE_OF and class_name[-1] not in [base.__name__ for base in cls.__mro__]:
                raise InputError(
                    f"{json_file}: holds a {class_name[-1]}, not a {cls.__name__}. Load it with its own class."
                )
            config["_class_name"] = class_name[-1]
        return config

    # --- writing ------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`, and the folder can be loaded by `DiffusionPipeline.from_pretrained`.

        A `README.md` in the folder stays as it is, also on the Hub with `push_to_hub=True`.

        Raises:
            InputError: If LoRA weights are loaded: the folder would be without the weights below them.
        """
        _refuse_adapters(self)
        for name, part in self.components.items():  # diffusers leaves out what was assigned where there was nothing
            if part is not None and self.config[name][0] is None:
                self.register_modules(**{name: part})
        folder = Path(save_directory)
        hub_names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_kwargs = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        super().save_pretrained(str(folder), **kwargs)
        self.write_shims(folder)
        if push_to_hub:
            _upload(self, folder, **{"repo_id": folder.name, **hub_kwargs})

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        card: str | Path | None = None,
    ) -> str:
        """As diffusers', but a model card of ours is not replaced by a generic one.

        Args:
            card: Model card (a Markdown file). Defaults to the `README.md` of the folder this pipeline was loaded from, if it was.
        """
        origin = getattr(self.config, "_name_or_path", None)
        if card is None and origin:
            card = Path(origin) / "README.md"
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            if card is not None and Path(card).is_file():
                text = Path(card).read_text(encoding="utf-8")
                (Path(folder) / "README.md").write_text(text, encoding="utf-8")
            return _upload(self, Path(folder), repo_id, commit_message, private, token, create_pr, subfolder)

    @classmethod
    def write_shims(cls, folder: Path) -> None:
        """Rewrite `model_index.json` of a saved folder and add `pipeline.py` and a shim for each component of this package."""
        index_path = folder / "model_index.json"
        index = json.loads(index_path.read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)  # where it was loaded from is nobody else's business
        imports = []
        for name, entry in index.items():
            if not names_class(entry):
                continue
            module, class_name = entry
            for config in (
                folder / name / "config.json",
                *folder.glob(f"{name}_[1-9]/config.json"),
            ):  # several ControlNets
                _forget_origin(config)
            for stale in (folder / name).glob(f"{PACKAGE}.*.py"):
                stale.unlink()
            if _is_public(module, class_name):
                shim = COMPONENT_SHIM.format(module=module, class_name=class_name)
                (folder / name / f"{module}.py").write_text(shim, encoding="utf-8")
                imports.append(f"import {module}\n")
            elif module == "transformers":
                if class_name.endswith("ImageProcessorPil"):
                    index[name] = [module, class_name.removesuffix("Pil")]  # the Pil names exist in transformers 5 only
                _load_as_float32(folder / name / "config.json")
        if _is_public(cls.__module__, cls.__name__):
            index["_class_name"] = ["pipeline", cls.__name__]
            shim = PIPELINE_SHIM.format(
                imports="".join(sorted(set(imports))), module=cls.__module__, class_name=cls.__name__
            )
            (folder / "pipeline.py").write_text(shim, encoding="utf-8")
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_adapters(pipeline: DiffusionPipeline) -> None:
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and any(
            type(module).__module__.startswith("peft.") for module in component.modules()
        ):
            raise InputError(
                f"{name}: has LoRA weights, which a saved pipeline cannot hold. Call unload_lora_weights() first, after fuse_lora() "
                "to keep their effect; save_lora_weights() saves them alone."
            )


def _forget_origin(config_path: Path) -> None:
    """Drop the local path that a model was loaded from."""
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_as_float32(config_path: Path) -> None:
    """Let a transformers model load as float32 by default, as diffusers' models do; else half weights stay half."""
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if config.get("dtype", "float32") != "float32":
            config_path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _is_public(module: Any, class_name: Any) -> bool:
    """Whether `module` is where this package keeps its public class `class_name`."""
    return isinstance(class_name, str) and module == f"{PACKAGE}.{one2345pp.MODULE_OF.get(class_name)}"


def _upload(
    pipeline: DiffusionPipeline,
    folder: Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Create the repository if need be and upload a saved folder, with its card or else with diffusers' generic one."""
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if not (folder / "README.md").is_file() and not subfolder:
        card = populate_model_card(load_or_create_model_card(repo_id, token=token, is_pipeline=True))
        card.save(folder / "README.md")
    return pipeline._upload_folder(
        str(folder), repo_id, token=token, commit_message=commit_message, create_pr=create_pr, subfolder=subfolder
    )
