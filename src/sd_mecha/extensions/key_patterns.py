"""Patterns that select keys of a config: by name, component, block, or type of layer.

| pattern | selects |
|-|-|
| `*.attn1.*` | keys that fit; `*` stands for anything, `?` for one character |
| `re:attn[12]` | keys in which the regular expression is found |
| `component:vae` | the keys of a component of the config |
| `block:double_blocks.3` | those of a block; also `double_blocks.0-5`, `double_blocks.*`, `IN03` where that is known |
| `network` | those of all blocks of the network itself: of no text encoder and no autoencoder |
| `type:attention.q` | those of layers of that type, see `layer_types` |
| `x & y` | those that both patterns select |
"""

from __future__ import annotations

import fnmatch
import re
import weakref
from collections.abc import Collection, Iterable, Mapping

from sd_mecha.errors import ParameterError
from sd_mecha.extensions import merge_methods
from sd_mecha.extensions.blocks import Block, find_blocks
from sd_mecha.extensions.config_types import ModelConfig
from sd_mecha.extensions.key_map import realize
from sd_mecha.extensions.layer_types import LAYER_TYPES, layer_type
from sd_mecha.extensions.registry import suggestion

NETWORK = "network"
_BLOCK_CONFIG = "supermerger_blocks"
_WILD = re.compile(r"[*?\[]")
_IN_UNET = re.compile(r"(IN|M|OUT)\d\d")


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that no config could give a meaning.

    Raises:
        ParameterError: it is empty, its regular expression is malformed, or there is no such type of layer.
    """
    for part in _parts(pattern):
        kind, _, name = part.partition(":")
        if not part or (kind in _KINDS and not name):
            raise ParameterError("the pattern is empty")
        if kind == "re":
            try:
                re.compile(name)
            except re.error as error:
                raise ParameterError(f"the regular expression is malformed: {error}") from None
        elif kind == "type" and name not in LAYER_TYPES:
            raise ParameterError(
                f"no layer type is called {name!r}{suggestion(name, LAYER_TYPES)}; there are {', '.join(LAYER_TYPES)}"
            )


_KINDS = frozenset({"re", "component", "block", "type"})


def _parts(pattern: str) -> list[str]:
    return [pattern] if pattern.startswith("re:") else [part.strip() for part in pattern.split(" & ")]


class KeyPatterns:
    """What patterns select among the keys of one config."""

    def __init__(self, config: ModelConfig) -> None:
        self.identifier = config.identifier
        self.keys = tuple(config.keys())
        self._own = {alias: key for key, aliases in config.aliases().items() for alias in aliases}
        self._own.update({key: key for key in self.keys})
        self._components = {name: frozenset(component.keys()) for name, component in config.components().items()}
        found = find_blocks(config)
        classic = [Block(name, "", keys) for name, keys in classic_blocks(config).items()]
        unet = [block for block in classic if _IN_UNET.fullmatch(block.name)]
        self.blocks = [block for block in found if block.owner or not unet] + unet
        """Every block once: those of the network under their classic names where these are known."""
        self._families = (found, classic)
        self._types: dict[str, set[str]] | None = None

    def select(self, pattern: str) -> frozenset[str]:
        """Return the keys that a pattern selects.

        Raises:
            ParameterError: there is no such component, block or type of layer.
        """
        check_pattern(pattern)
        chosen = [self._select(part) for part in _parts(pattern)]
        return frozenset.intersection(*chosen)

    def blocks_among(self, keys: Collection[str]) -> dict[str, list[list[str]]]:
        """Return the blocks that some keys lie in, as lists of these keys in order of depth, by component."""
        found: dict[str, list[list[str]]] = {}
        for block in self.blocks:
            inside = [key for key in block.keys if key in keys]
            if inside:
                found.setdefault(block.owner, []).append(inside)
        return found

    def _select(self, part: str) -> frozenset[str]:
        kind, colon, name = part.partition(":")
        if part == NETWORK:
            return frozenset(key for block in self.blocks if not block.owner for key in block.keys)
        if not colon or kind not in _KINDS:
            return self._glob(part)
        if kind == "re":
            search = re.compile(name).search
            return frozenset(key for key in self.keys if search(key))
        if kind == "component":
            if name not in self._components:
                hint = suggestion(name, self._components)
                raise ParameterError(
                    f"{self.identifier} has no component {name!r}{hint}; its components are "
                    f"{', '.join(self._components)}"
                )
            return self._components[name]
        return self._block(name) if kind == "block" else self._of_type(name)

    def _glob(self, pattern: str) -> frozenset[str]:
        if not _WILD.search(pattern):
            return frozenset({self._own[pattern]}) if pattern in self._own else frozenset()
        match = re.compile(fnmatch.translate(pattern)).match
        return frozenset(key for key in self.keys if match(key))

    def _of_type(self, name: str) -> frozenset[str]:
        if self._types is None:
            self._types = {}
            for key in self.keys:
                kind = layer_type(key)
                if kind is not None:
                    for asked in {kind, kind.partition(".")[0]}:
                        self._types.setdefault(asked, set()).add(key)
        return frozenset(self._types.get(name, ()))

    def _block(self, name: str) -> frozenset[str]:
        for family in self._families:
            chosen = _named(family, name)
            if chosen:
                return frozenset(key for block in chosen for key in block.keys)
        if _WILD.search(name):
            return frozenset()
        names = [block.name for family in self._families for block in family]
        shown = f"its blocks are {_listed(names)}" if names else "its keys show no blocks"
        raise ParameterError(f"{self.identifier} has no block {name!r}{suggestion(name, names)}; {shown}")


def _named(family: Iterable[Block], name: str) -> list[Block]:
    """The blocks of a name, of a range of names, or of a pattern."""
    blocks = list(family)
    places = {block.name: place for place, block in enumerate(blocks)}
    if name in places:
        return [blocks[places[name]]]
    if _WILD.search(name):
        return [block for block in blocks if fnmatch.fnmatchcase(block.name, name)]
    first, dash, last = name.partition("-")
    if last.isdecimal():
        last = first[: len(first.rstrip("0123456789"))] + last
    if dash and first in places and last in places:
        low, high = sorted((places[first], places[last]))
        if blocks[low].owner == blocks[high].owner:
            return blocks[low : high + 1]
    return []


def _listed(names: Iterable[str]) -> str:
    """Names in few words: those that differ in their number alone become one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rstrip("0123456789"), []).append(name)
    return ", ".join(f"{g[0]} to {g[-1]}" if len(g) > 1 else g[0] for g in groups.values())


_known: weakref.WeakKeyDictionary[ModelConfig, KeyPatterns] = weakref.WeakKeyDictionary()


def patterns_of(config: ModelConfig) -> KeyPatterns:
    """Return what patterns mean for a config; worked out once for each config object."""
    try:
        found = _known.get(config)
    except TypeError:  # a config that cannot be referred to weakly
        return KeyPatterns(config)
    if found is None:
        found = _known[config] = KeyPatterns(config)
    return found


def classic_blocks(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Return the keys of each block by the names of block-weighted merging: BASE, IN00, ..., M00, ..., OUT00, ...

    They are those of the conversion from a config of block weights; empty where no such conversion is registered.
    """
    for method in merge_methods.get_all_converters():
        source = method.declaration.parameters.args[0].model_config
        target = method.declaration.result.model_config
        if source is None or target is None or target.identifier != config.identifier:
            continue
        if source.get_implementation_identifier() != _BLOCK_CONFIG:
            continue
        (name,) = method.declaration.names.args
        key_map = method.build_key_map({name: source}, config)
        found: dict[str, list[str]] = {block: [] for block in source.keys()}  # noqa: SIM118 (it is no mapping)
        for relation in () if key_map is None else key_map.relations:
            chosen = realize(relation, lambda parameter, key: True)
            for block in () if chosen is None else chosen.inputs.get(name, ()):
                found[block].extend(chosen.outputs if chosen is not None else ())
        return {block: tuple(keys) for block, keys in found.items() if keys}
    return {}
