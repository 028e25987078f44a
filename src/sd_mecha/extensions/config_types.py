"""What a model config is: the keys of a model, in named components.

A config knows, for each key, its shape, dtype, other names under which files carry it, and whether a model
may lack it. Configs are compared by identity and told apart by `identifier`,
`<architecture>-<implementation>`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch

from sd_mecha.errors import MechaError
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.dtypes import parse_dtype

_IDENTIFIER = re.compile(r"([a-z0-9._+]+)-([a-z0-9._+]+)")

MissingKeyHandler = Callable[["ModelConfig", str, Any, torch.dtype | None], torch.Tensor | None]
"""(config, key, device, dtype) -> the tensor that a file lacks, or None if it cannot be made."""


class InvalidConfigError(MechaError, ValueError):
    """A model config is not well formed."""


@dataclass(frozen=True, slots=True, init=False)
class KeyMetadata:
    """What is known of a key.

    Args:
        shape: its shape, None if any.
        dtype: its dtype or the name of one, None if any.
        aliases: other names under which files carry it.
        optional: whether a model may lack it.

    Raises:
        OptionError: the dtype has an unknown name.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    aliases: tuple[str, ...]
    optional: bool

    def __init__(
        self,
        shape: Iterable[int] | None = None,
        dtype: torch.dtype | str | None = None,
        aliases: Iterable[str] | None = (),
        optional: bool = False,
    ) -> None:
        names = (aliases,) if isinstance(aliases, str) else tuple(aliases or ())
        put = object.__setattr__  # a frozen dataclass refuses plain assignment
        put(self, "shape", None if shape is None else tuple(map(int, shape)))
        put(self, "dtype", parse_dtype(dtype) if isinstance(dtype, str) else dtype)
        put(self, "aliases", names)
        put(self, "optional", optional)

    def metadata(self) -> TensorEntry | None:
        """Return shape and dtype, None if either is not known."""
        return None if self.shape is None or self.dtype is None else TensorEntry(self.shape, self.dtype)


KeyLike = KeyMetadata | Mapping[str, Any] | None


class ModelComponent:
    """A named part of a model.

    Args:
        keys: key -> metadata; a mapping of the fields of `KeyMetadata`, or None, stands for one.
    """

    __slots__ = ("_keys",)

    def __init__(self, keys: Mapping[str, KeyLike]) -> None:
        self._keys: Mapping[str, KeyMetadata] = MappingProxyType(
            {key: _key_metadata(key, metadata) for key, metadata in keys.items()}
        )

    def keys(self) -> Mapping[str, KeyMetadata]:
        """Return key -> metadata."""
        return self._keys

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Return key -> its other names."""
        return {key: metadata.aliases for key, metadata in self._keys.items()}

    def metadata(self) -> dict[str, TensorEntry | None]:
        """Return key -> shape and dtype."""
        return {key: metadata.metadata() for key, metadata in self._keys.items()}

    def __repr__(self) -> str:
        return f"<model component of {len(self._keys)} keys>"


@runtime_checkable
class ModelConfig(Protocol):
    """The interface of every config; from `identifier` and `components` the rest follows."""

    @property
    @abstractmethod
    def identifier(self) -> str:
        """`<architecture>-<implementation>`."""

    @abstractmethod
    def components(self) -> Mapping[str, ModelComponent]:
        """Return the parts of the model by name."""

    def keys(self) -> Mapping[str, KeyMetadata]:
        """Return key -> metadata over all components."""
        return {key: m for component in self.components().values() for key, m in component.keys().items()}

    def metadata(self) -> Mapping[str, TensorEntry | None]:
        """Return key -> shape and dtype over all components."""
        return {key: metadata.metadata() for key, metadata in self.keys().items()}

    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """Return key -> its other names over all components."""
        return {key: metadata.aliases for key, metadata in self.keys().items()}

    def resolve_alias(self, key: str) -> str:
        """Return the key that a name in a file stands for; a name that the config does not know, as it is."""
        keys = self.keys()
        if key in keys:
            return key
        return next((own for own, metadata in keys.items() if key in metadata.aliases), key)

    def find(self, key: str) -> str | None:
        """Return the key that a name in a file stands for, None if the config does not know it."""
        own = self.resolve_alias(key)
        return own if own in self.keys() else None

    def create_missing_key(
        self, key: str, device: str | torch.device | None, dtype: torch.dtype | None
    ) -> torch.Tensor | None:
        """Return a tensor for a key that a file lacks, None if the config cannot make one."""
        return None

    def get_architecture_identifier(self) -> str:
        """Return the part of the identifier before the hyphen."""
        return self.identifier.partition("-")[0]

    def get_implementation_identifier(self) -> str:
        """Return the part of the identifier after the hyphen; all of it without one."""
        return self.identifier.rpartition("-")[2]


def check_identifier(identifier: object) -> None:
    """Refuse a malformed config identifier.

    Raises:
        InvalidConfigError: it is not `<architecture>-<implementation>`.
    """
    if not isinstance(identifier, str) or not _IDENTIFIER.fullmatch(identifier):
        raise InvalidConfigError(
            f"config identifier {identifier!r} is not of the form <architecture>-<implementation>, each of "
            "lowercase letters, digits, '.', '_' and '+', for example 'sd1-ldm'"
        )


def _key_metadata(key: str, metadata: Any) -> KeyMetadata:
    if isinstance(metadata, KeyMetadata):
        return metadata
    if metadata is None:
        return KeyMetadata()
    try:
        return KeyMetadata(**metadata)
    except (TypeError, ValueError) as error:
        raise InvalidConfigError(f"metadata of key {key!r} is not well formed: {error}") from error
