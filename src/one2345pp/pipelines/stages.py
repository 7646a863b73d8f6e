"""Stages in a chain: pipelines that are built from the chain's components, and what is set on them reaches the chain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import InputError


class StageMixin:
    """For pipelines that can be a stage of a chain: state of the running call, and assignments that act on the chain, too."""

    _slot: Slot | None = None  # of the chain that this stage belongs to
    _guidance_scale, _num_timesteps, _interrupt = 1.0, 0, False

    @property
    def guidance_scale(self) -> float:
        """Of the running call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call ends early; a callback may set `_interrupt`."""
        return self._interrupt

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if self._slot is not None and name in self._slot.names:
            self._slot.take_part(name, value)

    def register_to_config(self, **settings) -> None:
        """As `ConfigMixin.register_to_config`; of a stage in a chain, the chain keeps the settings, too."""
        if self._slot is not None:
            check_settings(self._slot.stage_class, set(settings) - set(self._slot.names), f"{self._slot.role}_config")
        super().register_to_config(**settings)
        if self._slot is not None:
            self._slot.take_settings(settings)


def component_names(stage_class: type[DiffusionPipeline]) -> list[str]:
    """Names of the components that a pipeline class takes, in alphabetical order."""
    return list(stage_class._get_signature_keys(stage_class)[0])


def register_arguments(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Register the components and settings that a pipeline's `__init__` was called with; `arguments` is its `locals()`."""
    owner = arguments["__class__"]  # whose `__init__` it is: a subclass may take more
    components, settings = owner._get_signature_keys(owner)
    pipe.register_modules(**{name: arguments[name] for name in components})
    pipe.register_to_config(**{name: arguments[name] for name in settings})


def settings_of(stage: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of a stage that are not components."""
    return {name: value for name, value in stage.config.items() if name not in stage.components and name[0] != "_"}


def make_stage(
    stage_class: type[DiffusionPipeline], parts: Mapping[str, Any], settings: Mapping[str, Any], name: str
) -> DiffusionPipeline:
    """A stage of components and settings. Raises `InputError` for settings that it does not have; `name` is what they are called."""
    check_settings(stage_class, settings, name)
    return stage_class(**parts, **settings)


def check_settings(stage_class: type[DiffusionPipeline], settings: Iterable[str], name: str) -> None:
    """Refuse settings that a stage does not have."""
    known = stage_class._get_signature_keys(stage_class)[1]
    if unknown := sorted(setting for setting in set(settings) - set(known) if setting[0] != "_"):
        raise InputError(f"{name}: got {unknown}, expected some of {', '.join(known)}.")


class Slot:
    """The place of one of the package's own stages in a chain.

    The stage is built anew when the chain's components or settings have changed, so it is never stale. It is the same object as long
    as they have not, so what else is set on it stays.

    Args:
        chain: Holds the components, flat.
        role: Name of the stage; the chain's settings for it are its config `ROLE_config`.
        stage_class: What to build.
        base: A role whose settings are used where this one has none.
        own: Names of components that the chain may hold for this stage alone, as `OWNER_NAME`, beside those that are shared.
    """

    def __init__(
        self,
        chain: DiffusionPipeline,
        role: str,
        stage_class: type[DiffusionPipeline],
        base: str | None = None,
        own: Sequence[str] = (),
    ):
        self.chain, self.role, self.stage_class, self.base, self.own = chain, role, stage_class, base, own
        self.names = component_names(stage_class)
        self._built: tuple[dict, dict, dict] | None = None
        self._stage: DiffusionPipeline | None = None

    @property
    def stage(self) -> DiffusionPipeline:
        """The stage on the chain's components and settings as they are now."""
        parts = {name: getattr(self.chain, self._place(name)) for name in self.names}
        settings = {**(self.chain.config[f"{self.base}_config"] if self.base else {}), **self._settings}
        bars, stage = getattr(self.chain, "_progress_bar_config", {}), self._stage
        if stage is None or not self._is_of(parts, settings):
            stage = make_stage(self.stage_class, parts, settings, f"{self.role}_config")
            stage.set_progress_bar_config(**getattr(self._stage, "_progress_bar_config", bars))
            stage._slot = self
        if self._built is None or self._built[2] != bars:
            stage.set_progress_bar_config(**bars)
        self._stage, self._built = stage, (parts, settings, bars)
        return stage

    def take_part(self, name: str, part: Any) -> None:
        """A component was set on the stage: the chain has it now; what other stages have of the same name stays theirs."""
        if name in self.own and part is None:
            raise InputError(
                f"{name}: cannot be None, since the {self.base or self.role} stage would take another stage's."
            )
        setattr(self.chain, self._alone(name) if name in self.own else name, part)

    def take_settings(self, settings: dict[str, Any]) -> None:
        """Settings were registered on the stage: the chain has them now."""
        known = {name: value for name, value in settings.items() if name in settings_of(self._stage)}
        self.chain.register_to_config(**{f"{self.role}_config": {**self._settings, **known}})

    @property
    def _settings(self) -> dict[str, Any]:
        return dict(self.chain.config[f"{self.role}_config"])

    def _place(self, name: str) -> str:
        """The chain's name of a component."""
        return self._alone(name) if name in self.own and getattr(self.chain, self._alone(name)) is not None else name

    def _alone(self, name: str) -> str:
        """The chain's name of a component that this stage alone has."""
        return f"{self.base or self.role}_{name}"

    def _is_of(self, parts: dict[str, Any], settings: dict[str, Any]) -> bool:
        before, known, _ = self._built
        return known == settings and all(part is before[name] for name, part in parts.items())
