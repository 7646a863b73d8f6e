"""Pipelines that are made of stages: flat components, stages that are built of them, and other people's stages in their place."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from ...errors import InputError
from ...names import FIRST_STAGES, LICENCES
from ..hub import SelfContainedMixin
from ..roles import METHODS
from ..stages import Slot, component_names, settings_of


def stage_property(role: str, doc: str) -> property:
    """The stage of a role as a property of a chain."""
    return property(lambda chain: chain.stage(role), doc=doc)


logger = logging.getLogger(__name__)

FOR_STAGES = ("dtype", "torch_dtype", "token", "cache_dir", "local_files_only")  # of loading, for all parts alike


class StageChain(SelfContainedMixin, DiffusionPipeline):
    """Base of a pipeline whose components are those of its stages. Settings of the stage `ROLE` are its config `ROLE_config`.

    A subclass's `__init__` registers components and settings; offload order and optional components follow from the stages.
    """

    STAGES: ClassVar[Mapping[str, type[DiffusionPipeline]]]  # by role, in the order of a call
    VARIANTS: ClassVar[Mapping[str, str]] = {}  # other settings for the stage of a role, by the variant's name
    OWN_PARTS: ClassVar[
        Mapping[str, Sequence[str]]
    ] = {}  # that a later stage may have beside an earlier one's, as `ROLE_NAME`
    OTHER_PARTS: ClassVar[Sequence[str]] = ()  # that belong to no stage; they come first

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = [f"{role}_{name}" for role, names in cls.OWN_PARTS.items() for name in names]
        shared = {name for names in cls.OWN_PARTS.values() for name in names}
        optional = [name for stage in cls.STAGES.values() for name in stage._optional_components if name not in shared]
        cls._optional_components = [*optional, *own, *cls.OTHER_PARTS]
        order = list(cls.OTHER_PARTS)
        for role, stage in cls.STAGES.items():
            for name in (stage.model_cpu_offload_seq or "").split("->"):
                order += [f"{role}_{name}"] * (name in cls.OWN_PARTS.get(role, ())) + [name]
        cls.model_cpu_offload_seq = "->".join(dict.fromkeys(name for name in order if name))

    def __init__(self):
        super().__init__()
        self._foreign: dict[str, Any] = {}
        bases = {role: None for role in self.STAGES} | dict(self.VARIANTS)
        self._slots = {
            role: Slot(self, role, self.STAGES[base or role], base, self.OWN_PARTS.get(base or role, ()))
            for role, base in bases.items()
        }

    @classmethod
    def of_stages(cls, stages: Mapping[str, Any], **others) -> StageChain:
        """A chain that shares the components of this package's stages, and holds any other stage as it is.

        Args:
            stages: By role.
            others: Components and settings that belong to no stage.
        """
        for role, stage in stages.items():
            if not callable(getattr(stage, METHODS[role], None)):
                raise InputError(
                    f"{role}: got {type(stage).__name__}, expected a stage with a method {METHODS[role]!r}."
                )
        own = {role: stage for role, stage in stages.items() if _takes_what(stage, cls.STAGES[role])}
        parts: dict[str, Any] = dict.fromkeys(component_names(cls))
        for role, stage in own.items():
            for name in component_names(cls.STAGES[role]):
                part = getattr(stage, name)
                if parts[name] is None:
                    parts[name] = part
                elif part is not None and part is not parts[name]:
                    parts[f"{role}_{name}"] = part
        settings = {f"{role}_config": settings_of(stage) for role, stage in own.items()}
        chain = cls(**parts | settings | others)
        chain._foreign = {role: stage for role, stage in stages.items() if role not in own}
        for role, slot in chain._slots.items():
            if (stage := own.get(cls.VARIANTS.get(role, role))) is not None:
                slot.stage_class = type(stage)  # may be a subclass
        return chain

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """As `SelfContainedMixin.from_pretrained`. A stage under its role, or its folder or Hub id, replaces the chain's. Settings in
        `ROLE_config` replace those of that name and leave the others."""
        for role, stage in cls.STAGES.items():
            if flat := sorted(set(kwargs) & set(stage._get_signature_keys(stage)[1])):
                raise InputError(f"{flat[0]}: is a setting of a stage. Pass {role}_config={{{flat[0]!r}: ...}}.")
        others = {role: kwargs.pop(role) for role in cls.STAGES if kwargs.get(role) is not None}
        settings = {name: kwargs.pop(name) for name in cls._get_signature_keys(cls)[1] if name in kwargs}
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        shared = {name: kwargs[name] for name in FOR_STAGES if name in kwargs}
        for role, stage in others.items():
            if isinstance(stage, str | Path):
                stage = FIRST_STAGES.get(stage, stage)
                if stage in LICENCES:
                    logger.warning("%s: %s.", stage, LICENCES[stage])
                others[role] = cls.STAGES[role].from_pretrained(stage, **shared)
        pipe = pipe.with_stages(**others) if others else pipe
        for name, new in settings.items():
            new = dataclasses.asdict(new) if dataclasses.is_dataclass(new) else new
            pipe.register_to_config(**{name: new if new is None else {**(pipe.config[name] or {}), **new}})
        if settings:
            pipe.check_settings()
        return pipe

    def check_settings(self) -> None:
        """Refuse settings that no stage has, or the guide, if there is one."""
        for role in (*self.STAGES, *self.VARIANTS):
            self.stage(role)
        getattr(self, "guide", None)

    def with_stages(self, **stages) -> StageChain:
        """A chain with other stages, by role, and everything else of this one."""
        own = {f"{role}_config" for role in self.STAGES}
        settings = {name: self.config[name] for name in self._get_signature_keys(self)[1] if name not in own}
        if unknown := sorted(set(stages) - set(self.STAGES)):
            raise InputError(f"with_stages: got {unknown}, expected some of {', '.join(self.STAGES)}.")
        settings |= self.settings_for(stages)
        others = {name: getattr(self, name) for name in self.OTHER_PARTS}
        return self.from_stages(**{**self.stages, **stages}, **settings, **others)

    def settings_for(self, stages: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the chain that suit new stages, by name; a subclass knows which."""
        return {}

    @property
    def stages(self) -> dict[str, Any]:
        """The stages of a call, by role."""
        return {role: self.stage(role) for role in self.STAGES}

    def stage(self, role: str) -> Any:
        """The stage of a role, or a variant of one, on the current components."""
        held = self.VARIANTS.get(role, role)
        return self._foreign[held] if held in self._foreign else self._slots[role].stage

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """As `SelfContainedMixin.save_pretrained`. Raises `InputError` if a stage is not of this package."""
        others = [role for role, stage in self.stages.items() if type(stage) is not self.STAGES[role]]
        if others:
            roles = ", ".join(f"{role} ({type(self.stage(role)).__name__})" for role in others)
            raise InputError(
                f"{roles}: not of this package, so this chain cannot be saved. Save the stages on their own."
            )
        super().save_pretrained(save_directory, **kwargs)


def _takes_what(stage: Any, stage_class: type[DiffusionPipeline]) -> bool:
    """Whether a stage is of that class, or of a subclass that can be built from the same components and settings."""
    if not isinstance(stage, stage_class):
        return False
    return stage._get_signature_keys(type(stage)) == stage_class._get_signature_keys(stage_class)
