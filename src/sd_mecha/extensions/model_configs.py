"""Model configs: what keys a kind of model has.

`register` adds a config of a checkpoint layout, `register_aux` one that derives from another (LoRA, blocks).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from sd_mecha.errors import DuplicateNameError, UnknownNameError
from sd_mecha.extensions.config_families import Family, FamilyConfig, Layout
from sd_mecha.extensions.config_inference import ConfigIndex, Entries, Fit
from sd_mecha.extensions.config_lazy import BuiltModelConfig, LazyModelConfigBase
from sd_mecha.extensions.config_tables import (
    INFER,
    STRUCTURAL,
    InferModelConfig,
    ModelConfigImpl,
    StructuralModelConfig,
    is_stub,
)
from sd_mecha.extensions.config_types import (
    InvalidConfigError,
    KeyMetadata,
    ModelComponent,
    ModelConfig,
    check_identifier,
)
from sd_mecha.extensions.config_yaml import YamlModelConfig, from_yaml, serialize, to_yaml
from sd_mecha.extensions.header import Header
from sd_mecha.extensions.registry import Registry, load_plugins, suggestion

__all__ = [
    "INFER",
    "STRUCTURAL",
    "BuiltModelConfig",
    "Family",
    "FamilyConfig",
    "Fit",
    "InferModelConfig",
    "InvalidConfigError",
    "KeyMetadata",
    "Layout",
    "LazyModelConfigBase",
    "ModelComponent",
    "ModelConfig",
    "ModelConfigImpl",
    "StructuralModelConfig",
    "YamlModelConfig",
    "candidates",
    "check_identifier",
    "fits",
    "from_yaml",
    "get_all",
    "get_all_aux",
    "get_all_base",
    "get_all_families",
    "infer_model_configs",
    "is_stub",
    "register",
    "register_aux",
    "register_family",
    "resolve",
    "serialize",
    "to_yaml",
    "unregister",
]

_registry: Registry[ModelConfig] = Registry("model config")
_aux: set[str] = set()
_families: dict[str, Family[Any]] = {}
_named: dict[str, FamilyConfig[Any]] = {}  # the sizes of families that have names


def _derived(header: Header) -> list[ModelConfig]:
    return [config for family in _families.values() for config in family.infer(header)]


_index = ConfigIndex(_registry.get_all, lambda: _registry.version + len(_families), _derived)


def register(config: ModelConfig) -> None:
    """Add a config of a checkpoint layout.

    Raises:
        InvalidConfigError: its identifier is malformed.
        DuplicateNameError: its identifier is taken.
    """
    check_identifier(config.identifier)
    _registry.register(config.identifier, config)


def register_aux(config: ModelConfig) -> None:
    """Add a config that derives from another one, such as that of a LoRA.

    Raises:
        InvalidConfigError, DuplicateNameError: as `register`.
    """
    register(config)
    _aux.add(config.identifier)


def register_family(family: Family[Any]) -> None:
    """Add a family of configs: those of its sizes that have names, and of every other size that a file may have.

    Raises:
        DuplicateNameError: a family has its name, or a config one of its identifiers.
    """
    named = {config.identifier: config for config in family.known()}
    taken = [i for i in named if i in _named or i in _registry.names()]
    if family.name in _families or taken:
        raise DuplicateNameError(
            f"config family {family.name!r} is already registered: "
            f"{', '.join(taken) or 'its name is taken'}; choose other names"
        )
    _families[family.name] = family
    _named.update(named)


def get_all_families() -> list[Family[Any]]:
    """Return the families of configs."""
    load_plugins()
    return list(_families.values())


def unregister(identifier: str) -> None:
    """Take a config out again.

    Raises:
        UnknownNameError: no config has that identifier.
    """
    _registry.remove(identifier)
    _aux.discard(identifier)


def resolve(identifier: str | ModelConfig) -> ModelConfig:
    """Return the config of that identifier: a stand-in for `"infer"` and `"structural"`, a config for itself.

    Raises:
        UnknownNameError: no config has that identifier.
    """
    if not isinstance(identifier, str):
        return identifier
    if identifier in ("infer", "structural"):
        return INFER if identifier == "infer" else STRUCTURAL
    if identifier in _registry:
        return _registry.resolve(identifier)
    for family in _families.values():
        found = family.resolve(identifier)
        if found is not None:
            return found
    near = suggestion(identifier, [*_registry, *_named])
    raise UnknownNameError(f"unknown model config: {identifier!r}{near}")


def get_all() -> list[ModelConfig]:
    """Return all registered configs, with those of the sizes of families that have names."""
    return [*_registry.get_all(), *_named.values()]


def get_all_base() -> list[ModelConfig]:
    """Return the configs added with `register`."""
    return [config for config in get_all() if config.identifier not in _aux]


def get_all_aux() -> list[ModelConfig]:
    """Return the configs added with `register_aux`."""
    return [config for config in _registry.get_all() if config.identifier in _aux]


def candidates(keys: Collection[str]) -> dict[ModelConfig, float]:
    """Return each config that knows a tenth or more of the keys, with the share that it does not know.

    Args:
        keys: names as a file carries them; aliases are understood. Without any, every config is a candidate.
    """
    return _index.candidates(keys)


def fits(entries: Entries | Collection[str], also: Iterable[ModelConfig] = ()) -> dict[ModelConfig, Fit]:
    """Return each config that knows a tenth or more of the keys, with how badly it fits.

    Args:
        entries: key -> shape and dtype where known, or the keys alone, as a file carries them.
        also: configs to consider besides the registered ones and those that the sizes of `entries` lead to.
    """
    return _index.fits(entries, also)


def infer_model_configs(keys: Collection[str]) -> list[set[ModelConfig]]:
    """Return the candidates of a state dict from best to worst, those that fit equally well in one set."""
    shares = candidates(keys)
    return [{config for config, other in shares.items() if other == share} for share in sorted(set(shares.values()))]
