"""What `builder.keys`, `builder.PARAM.keys` and `builder.out.keys` are: they select and list keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from sd_mecha.extensions.config_types import KeyMetadata, ModelConfig
from sd_mecha.extensions.key_clauses import Clause, KeyMapError, UnknownMapKeyError
from sd_mecha.extensions.registry import suggestion

if TYPE_CHECKING:
    from sd_mecha.extensions.key_map import KeyMapBuilder

InputConfig = ModelConfig | tuple[ModelConfig, ...] | None
"""Config of a parameter, a tuple of them where it takes any number of inputs, None where any key will do."""


class ParamKeysAccessor:
    """`builder.PARAM.keys`: select keys with `[...]`, list them with a call, with metadata by `.items()`."""

    def __init__(self, builder: KeyMapBuilder, param: str) -> None:
        config = builder.input_configs[param]
        self._param = param
        self._configs = config if isinstance(config, tuple) else () if config is None else (config,)
        self._keys = _common_keys(self._configs)

    def __getitem__(self, keys: str | Iterable[str]) -> Clause:
        return Clause({self._param: self._selection(keys)})

    def _selection(self, keys: str | Iterable[str]) -> tuple[str, ...]:
        group = _group(keys)
        if self._configs:
            for key in group:
                if key not in self._keys:
                    raise unknown_key(f"input (parameter {self._param!r})", key, self._keys, self._configs[0])
        return group

    def __call__(self) -> Iterable[str]:
        return self._keys.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def items(self) -> Iterable[tuple[str, KeyMetadata]]:
        """Iterate over (key, metadata)."""
        return self._keys.items()


class ParamProxy:
    """`builder.PARAM`; its `keys` select keys of that parameter."""

    def __init__(self, builder: KeyMapBuilder, name: str) -> None:
        self._builder = builder
        self._name = name
        self._accessor: ParamKeysAccessor | None = None

    @property
    def keys(self) -> ParamKeysAccessor:
        if self._accessor is None:  # most maps use few parameters, and a config may be lazy
            self._accessor = ParamKeysAccessor(self._builder, self._name)
        return self._accessor


class AllKeysAccessor:
    """`builder.keys`: select the same keys of every parameter; all inputs must share a config."""

    def __init__(self, builder: KeyMapBuilder) -> None:
        self._builder = builder
        self._shared: Mapping[str, KeyMetadata] | None = None
        self._configs: list[ModelConfig] = []

    def _keys(self) -> Mapping[str, KeyMetadata]:
        if self._shared is None:
            named = {param: config for param, config in self._builder.input_configs.items() if config is not None}
            configs = {param: config if isinstance(config, tuple) else (config,) for param, config in named.items()}
            flat = [config for group in configs.values() for config in group]
            if len({config.identifier for config in flat}) > 1:
                listed = ", ".join(f"{p}: {'/'.join(c.identifier for c in group)}" for p, group in configs.items())
                raise KeyMapError(f"`builder.keys` needs inputs of one config, got {listed}; use `builder.PARAM.keys`")
            self._configs = flat
            self._shared = _common_keys(flat)
        return self._shared

    def __getitem__(self, keys: str | Iterable[str]) -> Clause:
        group = _group(keys)
        if group:
            shared = self._keys()
            for key in group:
                if key not in shared and self._configs:
                    raise unknown_key("input", key, shared, self._configs[0])
        return Clause(dict.fromkeys(self._builder.params, group))

    def __call__(self) -> Iterable[str]:
        return self._keys().keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __contains__(self, key: object) -> bool:
        return key in self._keys()

    def items(self) -> Iterable[tuple[str, KeyMetadata]]:
        """Iterate over (key, metadata)."""
        return self._keys().items()


class OutputKeysAccessor:
    """`builder.out.keys`: lists the keys of the output config."""

    def __init__(self, builder: KeyMapBuilder) -> None:
        self._keys = builder.output_config.keys()

    def __call__(self) -> Iterable[str]:
        return self._keys.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def items(self) -> Iterable[tuple[str, KeyMetadata]]:
        """Iterate over (key, metadata)."""
        return self._keys.items()


class OutputProxy:
    """`builder.out`; its `keys` list the output keys."""

    def __init__(self, builder: KeyMapBuilder) -> None:
        self.keys = OutputKeysAccessor(builder)


def _group(keys: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(keys, str):
        return (keys,)
    try:
        group = tuple(keys)
    except TypeError:
        raise KeyMapError(f"an input key must be a str or a tuple of str, got {keys!r}") from None
    if len(set(group)) != len(group):
        raise KeyMapError(f"input keys are named twice in {shorten(group)}")
    return group


def _common_keys(configs: Iterable[ModelConfig]) -> Mapping[str, KeyMetadata]:
    tables = [config.keys() for config in dict.fromkeys(configs)]
    if len(tables) == 1:
        return tables[0]
    if not tables:
        return {}
    first, *others = tables
    return {key: metadata for key, metadata in first.items() if all(key in table for table in others)}


def unknown_key(role: str, key: object, known: Iterable[str], config: ModelConfig) -> UnknownMapKeyError:
    names = list(known)
    hint = suggestion(str(key), names)
    example = f", such as {names[0]!r}" if names and not hint else ""
    return UnknownMapKeyError(
        f"unknown {role} key {key!r}: config {config.identifier!r} has {len(names)} other keys{example}{hint}"
    )


def shorten(keys: tuple[object, ...]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return f"({shown})" if len(keys) <= 3 else f"({shown}, … {len(keys)} keys)"
