"""Which channels of which tensors may change places together without changing what a network computes.

Hidden channels of a network have no order: the channels between two layers can be shuffled when the rows of the first
and the columns of the second are. So can the channels within a head of attention, for queries with keys and for
values with the projection that follows. The groups are found by the names of layers; sizes come from the shapes in the
model config, so that the rules hold for any width and depth. Channels that many layers add to are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from sd_mecha.extensions import model_configs

HEAD_WIDTH = 64
"""Channels of a head in the text encoders, and in the UNet of Stable Diffusion XL."""


class Axis(NamedTuple):
    """The channels of a tensor from `start` on, along `dim`."""

    key: str
    dim: int
    start: int = 0


@dataclass(frozen=True)
class Runs:
    """Channels of several tensors that are shuffled alike: `count` runs of `size`, each shuffled within itself.

    The two sides meet in a product, such as queries and keys, or rows of a layer and columns of the next. `numbers`
    tells the permutations of all groups of a model apart, one for each run.
    """

    size: int
    numbers: range
    left: tuple[Axis, ...]
    right: tuple[Axis, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.left + self.right

    @property
    def count(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Group:
    """Tensors that are shuffled together, in one call of a merge method: their keys, sorted, and what is shuffled."""

    keys: tuple[str, ...]
    runs: tuple[Runs, ...]


Heads = Callable[[int], int]
"""Number of runs for a number of channels."""


class _Layers(NamedTuple):
    """A rule: the rows of a layer go with the columns of another, or with its rows where that is said.

    The first layer may hold `halves`, one to multiply the other.
    """

    first: str
    second: str
    kind: str = "hidden"
    rows: bool = False
    halves: int = 1


_RULES = (
    _Layers("self_attn.q_proj", "self_attn.k_proj", "text", rows=True),
    _Layers("self_attn.v_proj", "self_attn.out_proj", "text"),
    _Layers("mlp.fc1", "mlp.fc2"),
    _Layers("mlp.c_fc", "mlp.c_proj"),
    _Layers("attn1.to_q", "attn1.to_k", "image", rows=True),
    _Layers("attn1.to_v", "attn1.to_out.0", "image"),
    _Layers("attn2.to_q", "attn2.to_k", "image", rows=True),
    _Layers("attn2.to_v", "attn2.to_out.0", "image"),
    _Layers("ff.net.0.proj", "ff.net.2", halves=2),
    _Layers("time_embed.0", "time_embed.2"),
    _Layers("label_emb.0.0", "label_emb.0.2"),
)
_STACKED = "attn.in_proj_weight"
"""Queries, keys and values as one tensor, as in the larger text encoder of Stable Diffusion XL."""

_ATTENTION = re.compile(r"\.(self_attn|attn\d?)\.")

_IMAGE_RUNS: Mapping[str, Heads] = {
    "sd1-ldm": lambda width: 8,
    # sd-mecha 1 took the width of a head for the number of heads
    "sdxl-sgm": lambda width: HEAD_WIDTH,
}
_IMAGE_HEADS: Mapping[str, Heads] = {
    "sd1-ldm": lambda width: 8,
    "sdxl-sgm": lambda width: width // HEAD_WIDTH,
}


@cache
def permutable(config: str) -> Mapping[str, Group]:
    """What `randperm` and `rebasin` shuffle in checkpoints of a config: each key that takes part, and its group.

    The attention of the UNet of `sdxl-sgm` is divided as in sd-mecha 1, into 64 runs rather than into heads of 64
    channels, so that seeds and results are the same; some of these runs reach over two heads.
    """
    return _by_key(find_groups(_shapes(config), _text_heads, _IMAGE_RUNS[config]))


@cache
def attention_heads(config: str) -> Mapping[str, Group]:
    """The attention of checkpoints of a config: each key that takes part, and its group, in runs that are heads."""
    groups = find_groups(_shapes(config), _text_heads, _IMAGE_HEADS[config])
    return _by_key(group for group in groups if _ATTENTION.search(group.keys[0]))


def map_groups(builder: Any, groups_of: Callable[[str], Mapping[str, Group]]) -> None:
    """Declare in a `map_keys` that the keys of each group are made together, and all others alone.

    Args:
        builder: the key map builder.
        groups_of: gives the groups by the identifier of the config.
    """
    groups = groups_of(builder.output_config.identifier)
    for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
        together = groups[key].keys if key in groups else (key,)
        if key == together[0]:
            builder[together] = builder.keys[together]


def find_groups(shapes: Mapping[str, tuple[int, ...]], text_heads: Heads, image_heads: Heads) -> tuple[Group, ...]:
    """The groups among keys of the original layouts of Stable Diffusion, in the order of their first keys.

    Args:
        shapes: key -> shape of the whole model.
        text_heads: number of heads by width, in text encoders.
        image_heads: the same in UNets.

    >>> shapes = {"x.attn1.to_q.weight": (8, 8), "x.attn1.to_k.weight": (8, 8)}
    >>> [group] = find_groups(shapes, text_heads=lambda width: 1, image_heads=lambda width: 2)
    >>> group.runs[0].size, group.runs[0].count, group.runs[0].right
    (4, 2, (Axis(key='x.attn1.to_k.weight', dim=0, start=0),))
    """
    found = []
    heads: Mapping[str, Heads] = {"text": text_heads, "image": image_heads, "hidden": lambda width: 1}
    for key in shapes:
        if key.endswith(f".{_STACKED}"):
            found.append(_stacked(key.removesuffix(_STACKED), shapes, text_heads))
        for rule in _RULES:
            if key.endswith(f".{rule.first}.weight"):
                found.append(_layered(key.removesuffix(f"{rule.first}.weight"), shapes, rule, heads[rule.kind]))
    groups, first = [], 0
    for group in sorted(found, key=lambda group: group.keys):
        step, stop = len(group.runs), first + sum(runs.count for runs in group.runs)
        runs = (replace(part, numbers=range(first + i, stop, step)) for i, part in enumerate(group.runs))
        groups.append(Group(group.keys, tuple(runs)))
        first = stop
    return tuple(groups)


def _layered(prefix: str, shapes: Mapping[str, tuple[int, ...]], rule: _Layers, heads: Heads) -> Group:
    width = shapes[f"{prefix}{rule.first}.weight"][0] // rule.halves
    left = [
        Axis(key, 0, half * width) for key in _with_bias(prefix + rule.first, shapes) for half in range(rule.halves)
    ]
    second = prefix + rule.second
    right = [Axis(key, 0) for key in _with_bias(second, shapes)] if rule.rows else [Axis(f"{second}.weight", 1)]
    return _group(_runs(width, heads, left, right))


def _with_bias(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [key for key in (f"{layer}.bias", f"{layer}.weight") if key in shapes]


def _stacked(prefix: str, shapes: Mapping[str, tuple[int, ...]], heads: Heads) -> Group:
    width = shapes[prefix + _STACKED][0] // 3
    stacked = (f"{prefix}attn.in_proj_bias", prefix + _STACKED)
    queries, keys, values = ([Axis(key, 0, part * width) for key in stacked] for part in range(3))
    results = [Axis(f"{prefix}attn.out_proj.weight", 1)]
    return _group(_runs(width, heads, queries, keys), _runs(width, heads, values, results))


def _runs(width: int, heads: Heads, left: list[Axis], right: list[Axis]) -> Runs:
    return Runs(width // heads(width), range(heads(width)), tuple(left), tuple(right))


def _group(*runs: Runs) -> Group:
    return Group(tuple(sorted({axis.key for part in runs for axis in part.axes})), runs)


def _by_key(groups: Iterable[Group]) -> dict[str, Group]:
    return {key: group for group in groups for key in group.keys}


def _text_heads(width: int) -> int:
    return width // HEAD_WIDTH


def _shapes(config: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(metadata.shape or ()) for key, metadata in model_configs.resolve(config).keys().items()}
