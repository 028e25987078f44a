"""The configs themselves: of known keys, of keys as found, and stand-ins for one known later."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from sd_mecha.errors import PlanError
from sd_mecha.extensions.config_types import (
    InvalidConfigError,
    KeyLike,
    KeyMetadata,
    MissingKeyHandler,
    ModelComponent,
    ModelConfig,
    check_identifier,
)


class _TabledConfig(ModelConfig):
    """A config that holds its keys in tables, so that each lookup is one step."""

    def __init__(self, identifier: str, components: Mapping[str, ModelComponent], handler: Any = None) -> None:
        self._identifier = identifier
        self._components = MappingProxyType(dict(components))
        self._missing_key_handler = handler
        keys: dict[str, KeyMetadata] = {}
        for name, component in self._components.items():
            shared = keys.keys() & component.keys().keys()
            if shared:
                raise InvalidConfigError(
                    f"config {identifier!r}: key {min(shared)!r} is in component {name!r} and in another one"
                )
            keys.update(component.keys())
        self._keys = MappingProxyType(keys)
        self._names: dict[str, str] = {}
        for key, metadata in keys.items():
            for alias in metadata.aliases:
                self._names.setdefault(alias, key)
        self._names.update({key: key for key in keys})  # a key is never an alias of another one

    @property
    def identifier(self) -> str:
        return self._identifier

    def components(self) -> Mapping[str, ModelComponent]:
        return self._components

    def keys(self) -> Mapping[str, KeyMetadata]:
        return self._keys

    def resolve_alias(self, key: str) -> str:
        return self._names.get(key, key)

    def find(self, key: str) -> str | None:
        return self._names.get(key)

    def create_missing_key(
        self, key: str, device: str | torch.device | None, dtype: torch.dtype | None
    ) -> torch.Tensor | None:
        if self._missing_key_handler is None:
            return None
        return _handler(self._missing_key_handler)(self, key, device, dtype)

    def __repr__(self) -> str:
        return f"<model config {self.identifier!r}>"


class ModelConfigImpl(_TabledConfig):
    """A config of known keys.

    Args:
        identifier: `<architecture>-<implementation>`, each of `[a-z0-9._+]`.
        components: name -> component, or a mapping of key -> metadata.
        missing_key_handler: creates keys that a file lacks; a function, or the dotted name of one.

    Raises:
        InvalidConfigError: the identifier or a component is not well formed, or two components share a key.
    """

    def __init__(
        self,
        identifier: str,
        components: Mapping[str, ModelComponent | Mapping[str, KeyLike]],
        missing_key_handler: MissingKeyHandler | str | None = None,
    ) -> None:
        check_identifier(identifier)
        built = {}
        for name, component in components.items():
            if not isinstance(component, (ModelComponent, Mapping)):
                raise InvalidConfigError(
                    f"config {identifier!r}: component {name!r} must map keys to metadata, got {component!r}"
                )
            built[name] = component if isinstance(component, ModelComponent) else ModelComponent(component)
        super().__init__(identifier, built, missing_key_handler)


class StructuralModelConfig(_TabledConfig):
    """The config of a model that no known config fits: its keys as found, in one component named `keys`.

    Args:
        keys: key -> metadata, or the keys alone.
        source: what it is the config of, for messages; an empty text where that is not known.
        parts: names of components instead; a key belongs to the one that it begins with, before its first dot.
    """

    def __init__(
        self, keys: Mapping[str, KeyLike] | Iterable[str], source: str = "", parts: Iterable[str] = ()
    ) -> None:
        self.source = source
        table = keys if isinstance(keys, Mapping) else dict.fromkeys(keys)
        components: dict[str, dict[str, KeyLike]] = {part: {} for part in parts}
        for key, metadata in table.items():
            part = key.partition(".")[0]
            components.setdefault(part if part in components else "keys", {})[key] = metadata
        components = {part: found for part, found in components.items() if found} or {"keys": {}}
        super().__init__("structural", {part: ModelComponent(found) for part, found in components.items()})


class InferModelConfig(ModelConfig):
    """Stands for a known config that is still to be inferred; it has no keys to ask for."""

    @property
    def identifier(self) -> str:
        return "infer"

    def components(self) -> NoReturn:
        raise PlanError("the model config is not inferred yet; ask the finalised recipe for its config instead")

    def __repr__(self) -> str:
        return "<model config 'infer'>"


INFER = InferModelConfig()
"""Insists on a known config: unlike None it does not fall back to the structural one."""

STRUCTURAL = StructuralModelConfig(())
"""Stands for the structural config of a model whose keys are still to be read."""


def is_stub(config: object) -> bool:
    """Tell whether a config only stands for one that is known later (`INFER`, `STRUCTURAL`)."""
    return config is INFER or config is STRUCTURAL


def _handler(handler: Any) -> MissingKeyHandler:
    if not isinstance(handler, str):
        return handler  # type: ignore[no-any-return]
    module, _, name = handler.replace(":", ".").rpartition(".")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
