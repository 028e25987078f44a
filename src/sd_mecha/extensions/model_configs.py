"""Model configs: what keys a kind of model has.

`register` adds a config of a checkpoint layout, `register_aux` one that derives from another (LoRA, blocks).
"""

from __future__ import annotations

from collections.abc import Collection

from sd_mecha.extensions.config_inference import ConfigIndex
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
from sd_mecha.extensions.registry import Registry

__all__ = [
    "INFER",
    "STRUCTURAL",
    "BuiltModelConfig",
    "InferModelConfig",
    "InvalidConfigError",
    "KeyMetadata",
    "LazyModelConfigBase",
    "ModelComponent",
    "ModelConfig",
    "ModelConfigImpl",
    "StructuralModelConfig",
    "YamlModelConfig",
    "candidates",
    "check_identifier",
    "from_yaml",
    "get_all",
    "get_all_aux",
    "get_all_base",
    "infer_model_configs",
    "is_stub",
    "register",
    "register_aux",
    "resolve",
    "serialize",
    "to_yaml",
    "unregister",
]

_registry: Registry[ModelConfig] = Registry("model config")
_aux: set[str] = set()
_index = ConfigIndex(_registry.get_all, lambda: _registry.version)


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
    return _registry.resolve(identifier)


def get_all() -> list[ModelConfig]:
    """Return all registered configs."""
    return _registry.get_all()


def get_all_base() -> list[ModelConfig]:
    """Return the configs added with `register`."""
    return [config for config in _registry.get_all() if config.identifier not in _aux]


def get_all_aux() -> list[ModelConfig]:
    """Return the configs added with `register_aux`."""
    return [config for config in _registry.get_all() if config.identifier in _aux]


def candidates(keys: Collection[str]) -> dict[ModelConfig, float]:
    """Return each config that knows a tenth or more of the keys, with the share that it does not know.

    Args:
        keys: names as a file carries them; aliases are understood. Without any, every config is a candidate.
    """
    return _index.candidates(keys)


def infer_model_configs(keys: Collection[str]) -> list[set[ModelConfig]]:
    """Return the candidates of a state dict from best to worst, those that fit equally well in one set."""
    shares = candidates(keys)
    return [{config for config, other in shares.items() if other == share} for share in sorted(set(shares.values()))]
