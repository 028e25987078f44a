"""Configs that are built on first use."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch

from sd_mecha.extensions.config_tables import ModelConfigImpl
from sd_mecha.extensions.config_types import (
    KeyLike,
    KeyMetadata,
    ModelComponent,
    ModelConfig,
    check_identifier,
)
from sd_mecha.storage.contract import TensorEntry


class LazyModelConfigBase(ModelConfig):
    """A config whose keys are built when first asked for.

    A subclass gives `identifier` (a property or an attribute) and `create_config()`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._config: ModelConfig | None = None

    @abstractmethod
    def create_config(self) -> ModelConfig:
        """Build the config; called at most once, by one thread."""

    @property
    def underlying_config(self) -> ModelConfig:
        """The config itself, built now if it was not."""
        if self._config is None:
            with self._lock:
                if self._config is None:
                    self._config = self.create_config()
        return self._config

    def components(self) -> Mapping[str, ModelComponent]:
        return self.underlying_config.components()

    def keys(self) -> Mapping[str, KeyMetadata]:
        return self.underlying_config.keys()

    def metadata(self) -> Mapping[str, TensorEntry | None]:
        return self.underlying_config.metadata()

    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        return self.underlying_config.aliases()

    def resolve_alias(self, key: str) -> str:
        return self.underlying_config.resolve_alias(key)

    def find(self, key: str) -> str | None:
        return self.underlying_config.find(key)

    def create_missing_key(
        self, key: str, device: str | torch.device | None, dtype: torch.dtype | None
    ) -> torch.Tensor | None:
        return self.underlying_config.create_missing_key(key, device, dtype)

    def __repr__(self) -> str:
        return f"<model config {self.identifier!r}>"


class BuiltModelConfig(LazyModelConfigBase):
    """A config whose components are computed by a function on first use.

    Args:
        identifier: `<architecture>-<implementation>`.
        build: returns component name -> key -> metadata.
        signs: starts of keys, one of which every state dict of this config has a key with; it is built for no other
            state dict. Numbers between dots are written as `*`. Without any it is built to look at every state dict.

    Raises:
        InvalidConfigError: the identifier is malformed.
    """

    def __init__(
        self,
        identifier: str,
        build: Callable[[], Mapping[str, ModelComponent | Mapping[str, KeyLike]]],
        signs: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        check_identifier(identifier)
        self.signs = signs
        self._identifier = identifier
        self._build = build

    @property
    def identifier(self) -> str:
        return self._identifier

    def create_config(self) -> ModelConfig:
        return ModelConfigImpl(self._identifier, self._build())
