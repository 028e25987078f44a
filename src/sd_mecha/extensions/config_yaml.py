"""The YAML form of configs.

Components hold keys, and each key what is known of it:

    identifier: sd1-ldm
    components:
      vae:
        first_stage_model.decoder.conv_in.bias: {shape: [512], dtype: float32}
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from sd_mecha.extensions.config_lazy import LazyModelConfigBase
from sd_mecha.extensions.config_tables import ModelConfigImpl
from sd_mecha.extensions.config_types import (
    InvalidConfigError,
    KeyMetadata,
    ModelComponent,
    ModelConfig,
    check_identifier,
)
from sd_mecha.storage.dtypes import dtype_name


class YamlModelConfig(LazyModelConfigBase):
    """A config in a YAML file, parsed on first use.

    Args:
        yaml_config_file: the file; it is named after the identifier (`sd1-ldm.yaml`), so that listing configs
            opens no file.

    Raises:
        InvalidConfigError: the file name is not a config identifier; on first use, the file is malformed or
            holds another identifier.
    """

    def __init__(self, yaml_config_file: str | os.PathLike[str]) -> None:
        super().__init__()
        self.yaml_config_file = Path(yaml_config_file)
        self._identifier = self.yaml_config_file.stem
        check_identifier(self._identifier)

    @property
    def identifier(self) -> str:
        return self._identifier

    def create_config(self) -> ModelConfig:
        try:
            config = from_yaml(self.yaml_config_file.read_text(encoding="utf-8"))
        except InvalidConfigError as error:
            raise InvalidConfigError(f"{self.yaml_config_file}: {error}") from error
        if config.identifier != self._identifier:
            raise InvalidConfigError(
                f"{self.yaml_config_file} holds the config {config.identifier!r}; "
                f"rename the file to {config.identifier}.yaml"
            )
        return config


def from_yaml(yaml_config: str) -> ModelConfigImpl:
    """Parse the text of a config.

    Raises:
        InvalidConfigError: it is not the YAML of a config.
    """
    try:
        fields = yaml.load(yaml_config, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise InvalidConfigError(f"not valid YAML: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("components"), dict) or "identifier" not in fields:
        raise InvalidConfigError("a config needs the fields `identifier` and `components` (name -> key -> metadata)")
    unknown = fields.keys() - {"identifier", "components", "missing_key_handler"}
    if unknown:
        raise InvalidConfigError(f"unknown field {min(map(str, unknown))!r} in config {fields['identifier']!r}")
    fields["components"] = {name: component or {} for name, component in fields["components"].items()}
    return ModelConfigImpl(**fields)


def to_yaml(model_config: ModelConfig) -> str:
    """Return the text of a config, which `from_yaml` reads back to an equal one."""
    dumper = _dumper()
    return str(yaml.dump(serialize(model_config), Dumper=dumper, sort_keys=False, width=2**20, allow_unicode=True))


class _Row(dict[str, Any]):
    """A mapping that is written on one line."""


def serialize(obj: Any) -> Any:
    """Return a config, a component or the metadata of a key as plain dicts, lists and text.

    Raises:
        TypeError: the object is none of these.
    """
    if isinstance(obj, KeyMetadata):
        row = _Row()
        if obj.shape is not None:
            row["shape"] = list(obj.shape)
        if obj.dtype is not None:
            row["dtype"] = dtype_name(obj.dtype)
        if obj.aliases:
            row["aliases"] = list(obj.aliases)
        if obj.optional:
            row["optional"] = True
        return row
    if isinstance(obj, ModelComponent):
        return {key: serialize(metadata) for key, metadata in obj.keys().items()}
    if isinstance(obj, ModelConfig):
        plain: dict[str, Any] = {
            "identifier": obj.identifier,
            "components": {name: serialize(component) for name, component in obj.components().items()},
        }
        inner = obj.underlying_config if isinstance(obj, LazyModelConfigBase) else obj
        handler = getattr(inner, "_missing_key_handler", None)
        if handler is not None:
            plain["missing_key_handler"] = (
                handler if isinstance(handler, str) else f"{handler.__module__}.{handler.__qualname__}"
            )
        return plain
    raise TypeError(f"expected a model config, a component or the metadata of a key, got {type(obj).__name__}")


def _dumper() -> type[yaml.SafeDumper]:
    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
        pass

    Dumper.add_representer(_Row, lambda d, row: d.represent_mapping("tag:yaml.org,2002:map", row, flow_style=True))
    return Dumper
