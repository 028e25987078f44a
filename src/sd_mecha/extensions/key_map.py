"""Which input keys make which output keys.

A merge method that does more than "output key k needs key k of every parameter" declares a
`map_keys(builder)`; it is called with a `KeyMapBuilder` before any tensor is read. `KeyMapBuilder.build`
gives a `KeyMap`: for each output key the relation that produces it, shared by all keys that one call of the
method produces. While planning, `realize` picks the first alternative of a relation whose inputs can all be
had.

A parameter that takes any number of inputs is one parameter here: its keys are needed from each of its
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sd_mecha.extensions.config_types import KeyMetadata, ModelConfig
from sd_mecha.extensions.key_accessors import (
    AllKeysAccessor,
    InputConfig,
    OutputKeysAccessor,
    OutputProxy,
    ParamKeysAccessor,
    ParamProxy,
    shorten,
    unknown_key,
)
from sd_mecha.extensions.key_clauses import (
    Clause,
    ComposeObject,
    KeyMapError,
    ReqExpr,
    Requirement,
    UnknownMapKeyError,
    UnknownMapParameterError,
)
from sd_mecha.extensions.key_relations import (
    ActiveKeyMap,
    KeyMap,
    KeyRelation,
    RealizedKeyRelation,
    Report,
    identity_key_map,
    realize,
)
from sd_mecha.extensions.registry import suggestion

__all__ = [
    "ActiveKeyMap",
    "AllKeysAccessor",
    "Clause",
    "ComposeObject",
    "InputConfig",
    "KeyMap",
    "KeyMapBuilder",
    "KeyMapError",
    "KeyRelation",
    "OutputKeysAccessor",
    "OutputProxy",
    "ParamKeysAccessor",
    "ParamProxy",
    "RealizedKeyRelation",
    "ReqExpr",
    "Requirement",
    "UnknownMapKeyError",
    "UnknownMapParameterError",
    "build_key_map",
    "build_keys_map",
    "identity_key_map",
    "realize",
]


def build_key_map(
    map_keys: Callable[[KeyMapBuilder], object],
    input_configs: Mapping[str, InputConfig],
    output_config: ModelConfig,
) -> KeyMap:
    """Call a `map_keys` and return the map that it declares.

    Raises:
        KeyMapError: it contradicts itself or the configs; also an AttributeError for an unknown parameter, a
            KeyError for an unknown key.
    """
    builder = KeyMapBuilder(input_configs, output_config)
    map_keys(builder)
    return builder.build()


build_keys_map = build_key_map
"""Name of `build_key_map` in sd-mecha 1."""


class KeyMapBuilder:
    """Collects the relations of a key map; the argument of `map_keys`.

    Args:
        input_configs: parameter name -> config of its input; see `InputConfig`.
        output_config: config of the result.

    `builder[out] = needs` declares that one call makes the key, or each key of a tuple, or with `...` all
    keys of the output config. `needs` is built from `builder.keys[...]` and `builder.PARAM.keys[...]`.
    """

    def __init__(self, input_configs: Mapping[str, InputConfig], output_config: ModelConfig) -> None:
        self.input_configs = dict(input_configs)
        self.output_config = output_config
        self.params = tuple(self.input_configs)
        self.keys = AllKeysAccessor(self)
        self.out = OutputProxy(self)
        self._proxies = {param: ParamProxy(self, param) for param in self.params}
        self._output_keys: Mapping[str, KeyMetadata] = output_config.keys()
        self._relations: list[KeyRelation] = []
        self._made: dict[str, KeyRelation] = {}
        self._reports: list[Report] = []

    def __getattr__(self, name: str) -> ParamProxy:
        # reached only for names that are no attribute; also by copy and pickle before __init__ has run
        proxies: dict[str, ParamProxy] = self.__dict__.get("_proxies", {})
        if name in proxies:
            return proxies[name]
        known = ", ".join(map(repr, proxies)) or "none"
        raise UnknownMapParameterError(
            f"the merge method has no parameter {name!r}{suggestion(name, proxies)} (parameters: {known})"
        )

    def __setitem__(self, outputs: Any, needs: Requirement) -> None:
        if not isinstance(needs, Requirement):
            raise KeyMapError(
                f"output {outputs!r} is set to {needs!r}; expected keys of inputs such as `builder.keys['k']`"
            )
        if outputs is ...:
            group: tuple[str, ...] = tuple(self._output_keys)
        else:
            group = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        if not group:
            raise KeyMapError("an output group needs at least one key, got an empty one")
        relation = KeyRelation(group, needs.clauses)
        for key in group:
            if key not in self._output_keys:
                raise unknown_key("output", key, self._output_keys, self.output_config)
            if key in self._made:
                other = self._made[key].outputs
                raise KeyMapError(
                    f"output key {key!r} is made twice: by the groups {shorten(other)} and {shorten(group)}"
                )
            self._made[key] = relation
        self._relations.append(relation)

    def report(self, report: Report) -> None:
        """Say what of the inputs the map makes nothing of.

        Args:
            report: called with `available(parameter, key)` when it is known what the inputs can produce; returns
                texts. Each is logged as a warning, once for each plan; it is an AdapterError instead where the merge
                has `strict_adapters`, or the node an argument `strict` that is true.
        """
        self._reports.append(report)

    def build(self) -> KeyMap:
        """Return the map declared so far."""
        return KeyMap(self._relations, self._reports)
