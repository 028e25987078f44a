"""What every model config owes: a sound identifier, components that cover its keys, distinct names."""

from __future__ import annotations

from collections.abc import Mapping

from sd_mecha.errors import ContractError, MechaError
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.model_configs import KeyMetadata, ModelConfig


def check_model_config(config: ModelConfig) -> None:
    """Check that a model config is sound.

    - Its identifier is `<architecture>-<implementation>`.
    - Its components hold each of its keys exactly once, and nothing else.
    - Shapes are such.
    - Every alias leads to its key, and to no other; a key leads to itself.
    - Written as YAML and read again, it is the same.

    Args:
        config: the config; it need not be registered.

    Raises:
        ContractError: it is not; the message names the config, the key and what is wrong.
    """
    _check_identifier(config)
    _check_components(config)
    for key, metadata in config.keys().items():
        _check_metadata(config, key, metadata)
    _check_names(config)
    _check_yaml(config)


def _fail(config: ModelConfig, what: str) -> None:
    raise ContractError(f"model config {config.identifier!r}: {what}")


def _check_identifier(config: ModelConfig) -> None:
    try:
        model_configs.check_identifier(config.identifier)
    except MechaError as error:
        raise ContractError(str(error)) from error
    parts = f"{config.get_architecture_identifier()}-{config.get_implementation_identifier()}"
    if parts != config.identifier:
        _fail(config, f"architecture and implementation make {parts!r}")


def _check_components(config: ModelConfig) -> None:
    keys = config.keys()
    owner: dict[str, str] = {}
    for name, component in config.components().items():
        for key in component.keys():  # noqa: SIM118 (a component is no mapping)
            if key in owner:
                _fail(config, f"key {key!r} is in components {owner[key]!r} and {name!r}")
            owner[key] = name
            if key in keys and component.keys()[key] != keys[key]:
                _fail(config, f"the metadata of key {key!r} differs between keys() and component {name!r}")
    if lost := keys - owner.keys():
        _fail(config, f"key {min(lost)!r} is in no component ({len(lost)} such keys)")
    if extra := owner.keys() - keys:
        key = min(extra)
        _fail(config, f"component {owner[key]!r} holds {key!r}, which keys() lacks ({len(extra)} such keys)")


def _check_metadata(config: ModelConfig, key: str, metadata: KeyMetadata) -> None:
    shape = metadata.shape
    if shape is not None and not all(isinstance(size, int) and size >= 0 for size in shape):
        _fail(config, f"key {key!r} has the shape {shape!r}; expected integers from 0")


def _check_names(config: ModelConfig) -> None:
    keys = config.keys()
    for key in keys:
        if config.resolve_alias(key) != key:
            _fail(config, f"key {key!r} resolves to {config.resolve_alias(key)!r}")
    owner: dict[str, str] = {}
    for key, metadata in keys.items():
        for alias in metadata.aliases:
            if alias in keys:
                _fail(config, f"alias {alias!r} of {key!r} is a key of its own")
            if owner.setdefault(alias, key) != key:
                _fail(config, f"alias {alias!r} belongs to {owner[alias]!r} and to {key!r}")
            if config.resolve_alias(alias) != key:
                _fail(config, f"alias {alias!r} of {key!r} resolves to {config.resolve_alias(alias)!r}")


def _check_yaml(config: ModelConfig) -> None:
    again = model_configs.from_yaml(model_configs.to_yaml(config))
    if again.identifier != config.identifier:
        _fail(config, f"read from its own YAML, the identifier is {again.identifier!r}")
    before, after = _tables(config), _tables(again)
    if before.keys() != after.keys():
        _fail(config, f"read from its own YAML, its components are {sorted(after)}, not {sorted(before)}")
    for name, keys in before.items():
        for key in keys.keys() | after[name].keys():
            old, new = keys.get(key), after[name].get(key)
            if old != new:
                _fail(config, f"read from its own YAML, key {key!r} is {new} instead of {old}")


def _tables(config: ModelConfig) -> dict[str, Mapping[str, KeyMetadata]]:
    return {name: component.keys() for name, component in config.components().items()}
