"""Conversions between layouts of one network that follow from rules (see `layouts`), made when they are asked for.

Families of configs bring their own rules; `register` adds rules between two configs of other kinds.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sd_mecha.extensions import merge_methods, model_configs
from sd_mecha.extensions.config_families import FamilyConfig
from sd_mecha.extensions.layouts import Link, Rule, inverse, links
from sd_mecha.extensions.merge_methods import MergeMethod, Parameter, Return, StateDict, merge_method
from sd_mecha.extensions.model_configs import ModelConfig

_IDENTIFIER = re.compile(r"convert_'([^']+)'_to_'([^']+)'")

_rules: dict[tuple[str, str], Callable[[], Iterable[Rule]]] = {}
_links: dict[tuple[str, str], dict[str, Link]] = {}
_methods: dict[tuple[str, str], MergeMethod] = {}
_lock = threading.RLock()


def register(source: str, target: str, rules: Callable[[], Iterable[Rule]]) -> None:
    """Add the rules that make one config of another; both directions become conversions.

    Args:
        source, target: identifiers of the configs.
        rules: makes the rules; called when they are first needed.

    Raises:
        ValueError: there are rules between the two already.
    """
    if (source, target) in _rules or (target, source) in _rules:
        raise ValueError(f"there are rules between {source} and {target} already")
    _rules[source, target] = rules


def neighbours(identifier: str) -> list[str]:
    """The identifiers of configs that rules lead to from one config."""
    found = [b if a == identifier else a for a, b in _rules if identifier in (a, b)]
    config = _config(identifier)
    if isinstance(config, FamilyConfig):
        found += [there.identifier for there in config.family.neighbours(config)]
    return found


def links_between(source: ModelConfig, target: ModelConfig) -> Mapping[str, Link] | None:
    """What each key of `target` is made of in `source`; None where no rule leads from one to the other."""
    pair = source.identifier, target.identifier
    with _lock:
        if pair not in _links:
            made = _made(source, target)
            if made is None:
                return None
            _links[pair] = made
        return _links[pair]


class RuleConversions:
    """The conversions that follow from rules, by name and by where they start."""

    def method(self, identifier: str) -> MergeMethod | None:
        """The conversion of that name, `convert_'SOURCE'_to_'TARGET'`."""
        named = _IDENTIFIER.fullmatch(identifier)
        if named is None or named[2] not in neighbours(named[1]):
            return None
        return _method(named[1], named[2])

    def starting_at(self, identifier: str) -> list[tuple[str, MergeMethod]]:
        """The identifiers of the configs that one step leads to, each with the conversion."""
        return [(target, _method(identifier, target)) for target in neighbours(identifier)]


def apply(link: Link, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a link describes.

    Args:
        tensors: the whole tensors that its parts are rows of.
    """
    rows = []
    for part in link.parts:
        tensor = tensors[part.key]
        whole = not tensor.dim() or (part.start == 0 and part.stop == tensor.shape[0])
        rows.append(tensor if whole else tensor[part.start : part.stop])
    joined = rows[0] if len(rows) == 1 else torch.cat(rows)
    if link.turned:
        return joined.t().contiguous()
    return joined if joined.shape == link.shape else joined.reshape(link.shape)


def _config(identifier: str) -> ModelConfig | None:
    try:
        return model_configs.resolve(identifier)
    except KeyError:
        return None


def _made(source: ModelConfig, target: ModelConfig) -> dict[str, Link] | None:
    if isinstance(source, FamilyConfig) and isinstance(target, FamilyConfig) and source.family is target.family:
        return source.family.links(source.hyper, source.layout, target.layout) if source.hyper == target.hyper else None
    forward = _rules.get((source.identifier, target.identifier))
    if forward is not None:
        return _known(links(forward(), _shapes(source)), target)
    backward = _rules.get((target.identifier, source.identifier))
    if backward is not None:
        shapes = _shapes(target)
        return inverse(_known(links(backward(), shapes), source), shapes)
    return None


def _known(made: Mapping[str, Link], target: ModelConfig) -> dict[str, Link]:
    keys = target.keys()
    return {key: link for key, link in made.items() if key in keys}


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {key: metadata.shape for key, metadata in config.keys().items() if metadata.shape is not None}


def _method(source: str, target: str) -> MergeMethod:
    with _lock:
        if (source, target) not in _methods:
            _methods[source, target] = _conversion(source, target)
        return _methods[source, target]


def _conversion(source: str, target: str) -> MergeMethod:
    start, end = model_configs.resolve(source), model_configs.resolve(target)

    class Conversion:
        __doc__ = f"Give the keys and shapes of `{target}` to a state dict of `{source}`."

        @staticmethod
        def map_keys(builder: Any) -> None:
            made = links_between(start, end) or {}
            for key, link in made.items():
                builder[key] = builder.weights.keys[tuple(dict.fromkeys(part.key for part in link.parts))]

        def __call__(self, weights: Any, **kwargs: Any) -> Any:
            made = links_between(start, end) or {}
            return apply(made[kwargs["key"]], weights)

    call: Any = Conversion.__call__
    call.__annotations__ = {
        "weights": Parameter(StateDict[Tensor], model_config=start),
        "return": Return(Tensor, model_config=end),
    }
    return merge_method(identifier=f"convert_'{source}'_to_'{target}'", register=False, is_conversion=True)(Conversion)


merge_methods.register_conversions(RuleConversions())
