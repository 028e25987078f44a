"""Blocks: the layers that a network repeats, found in the numbered groups of a config's keys.

A list is a name above numbers: `double_blocks`, `input_blocks`, `model.layers`. Its members are blocks if there are
two or more and they hold several modules; the steps of a small sequence (`time_embed.0`, `time_embed.2`) are none. The
first such list on the way down a key counts, so that `input_blocks.4.1.transformer_blocks.0` lies in `input_blocks.4`.
The middle of a UNet or of an autoencoder is a block too, although nothing counts it.

Names. A block of the network itself goes by its path without the wrapper around it (`model.diffusion_model.`): it is
`double_blocks.3`. Any other component puts its own name first: `t5xxl.block.3` where one list holds all its blocks,
else the path below what its keys have in common, `vae.encoder.down.0`. Models of unknown architecture have no
components; their text encoders and autoencoders are told by usual prefixes, and go by their path.

Depth. Blocks come in the order in which data passes: inputs, middle, outputs; double before single ones; side
networks, such as refiners of text, before all. The components stay in the order of the config.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sd_mecha.extensions.config_types import ModelConfig

NETWORK = ("diffuser", "unet", "transformer", "dit", "model")
"""Names of the component that holds the network itself, where there are several components."""

_WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "net.", "unet.", "model.", "module.", "transformer.")
_OTHERS = re.compile(
    r"(text_encoders\.\w+|conditioner\.embedders\.\d+|cond_stage_model|first_stage_model|text_encoder(?:_\d+)?|te\d?|vae)\."
)
_NO_BLOCKS = frozenset({"embedders", "experts"})  # numbered, but beside each other rather than one after another
_MIDDLE = frozenset({"middle_block", "mid_block", "middle", "mid"})
_SIDE = re.compile(r"refiner|adapter|distilled|embedder|vision|siglip")
_STAGES = (re.compile(r"(input|down|double|joint)"), re.compile(r"(output|out_|up|single)"))


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a config.

    Attributes:
        name: as in `blocks_of`.
        owner: the component it lies in, or the prefix that stands for one; empty for the network itself.
        keys: its keys, in the order of the config.
    """

    name: str
    owner: str
    keys: tuple[str, ...]


_known: weakref.WeakKeyDictionary[ModelConfig, tuple[Block, ...]] = weakref.WeakKeyDictionary()


def blocks_of(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Return the keys of each block of a config, by the block's name, in order of depth.

    Keys outside of all blocks, such as those of embeddings, are in none.

    >>> from sd_mecha.extensions.model_configs import StructuralModelConfig
    >>> keys = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("attn.q", "mlp.up")]
    >>> dict(blocks_of(StructuralModelConfig([*keys, "lm_head.weight"])))
    {'layers.0': ('model.layers.0.attn.q.weight', 'model.layers.0.mlp.up.weight'),
     'layers.1': ('model.layers.1.attn.q.weight', 'model.layers.1.mlp.up.weight')}
    """
    return MappingProxyType({block.name: block.keys for block in find_blocks(config)})


def find_blocks(config: ModelConfig) -> tuple[Block, ...]:
    """Return the blocks of a config in order of depth; found once for each config object."""
    try:
        found = _known.get(config)
    except TypeError:  # a config that cannot be referred to weakly
        return tuple(_find(config))
    if found is None:
        found = _known[config] = tuple(_find(config))
    return found


def network_component(config: ModelConfig) -> str | None:
    """Return the name of the component that holds the network itself, None if there is none that is called so."""
    components = config.components()
    if len(components) == 1:
        return next(iter(components))
    return next((name for name in NETWORK if name in components), None)


def _find(config: ModelConfig) -> Iterator[Block]:
    network = network_component(config)
    alone = len(config.components()) == 1
    for name, component in config.components().items():
        paths = _paths(component.keys())
        if name != network:
            owners = dict.fromkeys(paths, name)
        else:
            owners = {path: other[1] if alone and (other := _OTHERS.match(path)) else "" for path in paths}
        place = {owner: number for number, owner in enumerate(dict.fromkeys(owners.values()))}
        ordered = sorted(paths, key=lambda path: (place[owners[path]], _depth(path)))
        named = _network_names(ordered) if name == network else _component_names(name, ordered, component.keys())
        yield from (Block(named[path], owners[path], tuple(paths[path])) for path in ordered)


def _paths(keys: Iterable[str]) -> dict[str, list[str]]:
    """The blocks among some keys: the path of each, down to its number, with its keys."""
    split = {key: key.split(".") for key in keys}
    modules: dict[str, dict[str, set[str]]] = {}  # list -> number -> modules in that member
    for parts in split.values():
        for place, part in enumerate(parts):
            if part.isdecimal() and place:
                members = modules.setdefault(".".join(parts[:place]), {})
                members.setdefault(part, set()).add(".".join(parts[place + 1 : -1]))
    lists = {
        path
        for path, members in modules.items()
        if len(members) > 1
        and path.rpartition(".")[2] not in _NO_BLOCKS
        and any(len(inside - {""}) > 1 for inside in members.values())
    }
    found: dict[str, list[str]] = {}
    for key, parts in split.items():
        for place, part in enumerate(parts[:-1]):
            if part in _MIDDLE:
                found.setdefault(".".join(parts[: place + 1]), []).append(key)
                break
            if part.isdecimal() and ".".join(parts[:place]) in lists:
                found.setdefault(".".join(parts[: place + 1]), []).append(key)
                break
    return found


def _depth(path: str) -> tuple[int, int, int, str, int]:
    """What sorts the blocks of a component."""
    parts = path.split(".")
    number = int(parts.pop()) if parts[-1].isdecimal() else 0
    last = parts[-1]
    side = 0 if _SIDE.search(path) else 1
    section = 0 if "encoder" in parts else 2 if "decoder" in parts else 1
    stage = 0 if _STAGES[0].match(last) else 2 if _STAGES[1].match(last) else 1
    if last == "up":  # counted by resolution, which grows towards the output
        number = -number
    return side, section, stage, "" if stage == 1 and last in _MIDDLE else ".".join(parts), number


def _network_names(paths: Iterable[str]) -> dict[str, str]:
    short = {path: _unwrapped(path) for path in paths}
    names = list(short.values())
    return {path: name if names.count(name) == 1 else path for path, name in short.items()}


def _unwrapped(path: str) -> str:
    prefix = next((p for p in _WRAPPERS if path.startswith(p)), "")
    return path[len(prefix) :]


def _component_names(component: str, paths: list[str], keys: Iterable[str]) -> dict[str, str]:
    listed = {path: path.rpartition(".") for path in paths}
    if len({parts[0] for parts in listed.values()}) == 1:
        return {path: f"{component}.{parts[0].rpartition('.')[2]}.{parts[2]}" for path, parts in listed.items()}
    cut = len(_common(key for key in keys if "." in key)) if paths else 0
    return {path: f"{component}.{path[cut:]}" for path in paths}


def _common(keys: Iterable[str]) -> str:
    """The whole names that some keys begin with."""
    first, *others = keys
    common = first.rpartition(".")[0] + "."
    for key in others:
        while not key.startswith(common):
            common = common[: common.rfind(".", 0, -1) + 1]
    return common
