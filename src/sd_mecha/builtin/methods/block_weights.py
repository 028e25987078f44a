"""A number for each key, by rules over names, components, blocks and types of layers: what `alpha` is often given."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sd_mecha.errors import ParameterError
from sd_mecha.extensions.key_patterns import NETWORK
from sd_mecha.extensions.merge_methods import MergeMethod, Parameter, Return, merge_method
from sd_mecha.extensions.weight_rules import Each, Mixture, apply_rules, read_rules, write_rules
from sd_mecha.recipes.nodes import RecipeNode

Value = float | str | Sequence[float] | Mixture

_logger = logging.getLogger("sd_mecha")


@merge_method(tiling="shape", reuse_outputs=False, identifier="weights")
class weights_by_rules:
    """Give each key a number by rules, later ones winning: weights per block, layer type, component or name.

    Formula: `result[k] = value of the last rule that selects k`, or `default`.

    Args:
        rules: text that `sd_mecha.weights` writes: a JSON list of patterns with values.
        default: any number; what keys get that no rule selects.
        strict: refuse rules that select nothing, instead of a warning.

    Use when: never by hand; `sd_mecha.weights({...})` builds it.
    Cost: keys alone, while planning; no tensor is read.
    Source: block-weighted merging of the image-model merging community.

    >>> import sd_mecha, torch
    >>> a, b = (sd_mecha.model({"x.weight": torch.tensor(v), "y.weight": torch.tensor(v)}) for v in (0.0, 8.0))
    >>> merged = sd_mecha.merge(sd_mecha.weighted_sum(a, b, alpha=sd_mecha.weights({"y.*": 0.5}, default=0.25)))
    >>> merged["x.weight"].item(), merged["y.weight"].item()
    (2.0, 4.0)
    """

    def __init__(self) -> None:
        self._made: tuple[Any, Mapping[str, float]] | None = None

    def __call__(
        self,
        rules: Parameter(str) = "[]",
        default: Parameter(float) = 0.0,
        strict: Parameter(bool) = False,
        **kwargs: Any,
    ) -> Return(float, "param"):
        config = kwargs.get("config")
        if config is None:
            raise ParameterError("weights: rules, default and strict must be plain values, not computed ones")
        if self._made is None or self._made[0] is not config:
            self._made = config, _table(rules, default, strict, config)
        return self._made[1][kwargs["key"]]


by_rules: MergeMethod = weights_by_rules  # type: ignore[assignment]


def _table(rules: str, default: float, strict: bool, config: Any) -> Mapping[str, float]:
    made = apply_rules(read_rules(rules), default, config)
    if made.unmatched:
        names = ", ".join(map(repr, dict.fromkeys(made.unmatched)))
        message = f"weights: nothing in {config.identifier} is given a number by {names}"
        if strict:
            raise ParameterError(f"{message}; correct these rules, or leave out strict=True")
        _logger.warning("%s", message)
    return made.table


def weights(
    rules: Mapping[str, Value] | Sequence[tuple[str, Value]] | Sequence[float] | str | Mixture,
    default: float = 0.0,
    strict: bool = False,
) -> RecipeNode:
    """Give each key of a model a number, for use as `alpha` and the like.

    Args:
        rules: patterns with values; of several that select a key the last one wins. `docs/block-weights.md` lists
            patterns and presets. A value is a number, or is spread over the blocks that the pattern selects, in order
            of depth: a list of numbers to interpolate, the name of a preset, or what `mix_weights` returns. Such a
            value alone goes to the blocks of the network; of a list of numbers alone, each is that of one block, in
            order of depth, and where there is one more than blocks, the first is for all that is in no block.
        default: what keys get that no rule selects.
        strict: refuse rules that select nothing, instead of a warning.

    Raises:
        ParameterError: a rule is malformed. What only the model can tell, such as the name of a block that it lacks,
            is found when the merge is planned.

    >>> weights({"type:attention": 0.5, "block:middle_block": [1, 0]}).merge_method.identifier
    'weights'
    """
    if isinstance(rules, (str, Mixture)):
        pairs: list[tuple[str, Any]] = [(NETWORK, rules)]
    elif isinstance(rules, Mapping):
        pairs = list(rules.items())
    elif not isinstance(rules, Sequence):
        raise ParameterError(f"weights: a {type(rules).__name__} is no rules; expected a dict of patterns with values")
    else:
        given: list[Any] = list(rules)
        paired = all(isinstance(rule, (list, tuple)) and len(rule) == 2 for rule in given)
        pairs = [tuple(rule) for rule in given] if paired else [(NETWORK, Each(tuple(given)))]
    if isinstance(default, bool) or not isinstance(default, (int, float)) or not math.isfinite(default):
        raise ParameterError(f"weights: default is {default!r}; expected a finite number")
    return by_rules(write_rules(pairs), float(default), strict)


def mix_weights(a: Value, b: Value, share: float) -> Mixture:
    """Mix two presets, lists of numbers or numbers, as a value for `weights`: `(1 - share) * a + share * b`.

    >>> mix_weights("GRAD_V", "COSINE", 0.3)
    Mixture(a='GRAD_V', b='COSINE', share=0.3)
    """
    return Mixture(a, b, share)
