"""Rules that give each key of a config a number: patterns with values, the later ones winning.

A value is a number, or something spread over the blocks that the pattern selects, from the first to the last of each
component: a list of numbers to draw a line through, the name of a preset, or a mixture of two of these. Keys outside
of all blocks take no part in that. `each` gives one number to each block instead.

As text, rules are one JSON list of pairs: `[["*",0.5],["type:attention","COSINE"],["network",{"each":[0,1]}]]`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from sd_mecha.errors import ParameterError
from sd_mecha.extensions.config_types import ModelConfig
from sd_mecha.extensions.curves import Curve, preset, sample, through
from sd_mecha.extensions.key_patterns import NETWORK, KeyPatterns, check_pattern, patterns_of


@dataclass(frozen=True, slots=True)
class Mixture:
    """A curve between two others: `(1 - share) * a + share * b`."""

    a: Any
    b: Any
    share: float


@dataclass(frozen=True, slots=True)
class Each:
    """One number for each block that a pattern selects."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern and the value of the keys that it selects: a number, a curve, or a number for each block."""

    pattern: str
    value: float | Curve | Each


def write_rules(rules: Sequence[tuple[str, Any]]) -> str:
    """Write rules as text.

    Args:
        rules: patterns with values: numbers, sequences of them, names of presets, `Mixture`, `Each`.

    Raises:
        ParameterError: a pattern or value is none; the message names the rule.
    """
    pairs = []
    for pattern, value in rules:
        if not isinstance(pattern, str):
            raise ParameterError(f"weights: a pattern is a str, got {pattern!r}")
        try:
            plain = _plain(value)
            check_pattern(pattern)
            _read_value(plain)
        except ParameterError as error:
            raise _about(pattern, error) from None
        pairs.append([pattern, plain])
    return json.dumps(pairs, separators=(",", ":"), ensure_ascii=False)


def read_rules(text: str) -> list[Rule]:
    """Read rules that were written as text.

    Raises:
        ParameterError: the text is not that of rules; the message names the rule.
    """
    try:
        pairs = json.loads(text)
    except ValueError as error:
        raise ParameterError(f"weights: the rules are no JSON: {error}; write them with sd_mecha.weights") from None
    if not isinstance(pairs, list):
        raise ParameterError("weights: the rules are no JSON list of pairs; write them with sd_mecha.weights")
    rules = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ParameterError(f"weights: {pair!r} is no rule; expected a pattern and its value")
        pattern, value = pair
        try:
            check_pattern(pattern)
            rules.append(Rule(pattern, _read_value(value)))
        except ParameterError as error:
            raise _about(pattern, error) from None
    return rules


@dataclass
class Weights:
    """What rules come to for one config.

    Attributes:
        table: key -> its number.
        unmatched: patterns that gave no key a number.
    """

    table: dict[str, float]
    unmatched: list[str]


def apply_rules(rules: Sequence[Rule], default: float, config: ModelConfig) -> Weights:
    """Give each key of a config its number.

    Args:
        rules: those that come later win.
        default: what keys get that no rule speaks of.

    Raises:
        ParameterError: a rule names a component or block that the config lacks, or gives a number to each of another
            number of blocks.
    """
    patterns = patterns_of(config)
    made = Weights(dict.fromkeys(patterns.keys, default), [])
    for rule in rules:
        try:
            given = _given(rule, patterns)
        except ParameterError as error:
            raise _about(rule.pattern, error) from None
        made.table.update(given)
        if not given:
            made.unmatched.append(rule.pattern)
    return made


def _given(rule: Rule, patterns: KeyPatterns) -> Mapping[str, float]:
    keys = patterns.select(rule.pattern)
    value = rule.value
    if isinstance(value, float):
        return dict.fromkeys(keys, value)
    groups = patterns.blocks_among(keys)
    if not isinstance(value, Each):
        spread = [(block, number) for blocks in groups.values() for block, number in _spread(value, blocks)]
        return {key: number for block, number in spread for key in block}
    blocks = [block for group in groups.values() for block in group]
    numbers, made = list(value.values), {}
    if rule.pattern == NETWORK and len(numbers) == len(blocks) + 1:
        base = numbers.pop(0)
        made = {key: base for key in patterns.keys if key not in keys}
    if len(numbers) != len(blocks):
        more = f" or {len(blocks) + 1}, the first for all that is in no block" if rule.pattern == NETWORK else ""
        raise ParameterError(
            f"{len(numbers)} numbers, but {patterns.identifier} has {len(blocks)} such blocks; "
            f"expected {len(blocks)}{more}"
        )
    return made | {key: number for block, number in zip(blocks, numbers, strict=True) for key in block}


def _spread(curve: Curve, blocks: list[list[str]]) -> list[tuple[list[str], float]]:
    return list(zip(blocks, sample(curve, len(blocks)), strict=True))


def _plain(value: Any) -> Any:
    """A value as JSON has it; what is none of the known ones stays, to be refused."""
    if isinstance(value, Mixture):
        return {"mix": [_plain(value.a), _plain(value.b), _plain(value.share)]}
    if isinstance(value, Each):
        return {"each": [_plain(number) for number in value.values]}
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, Real):  # those of numpy, too
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(number) for number in value]
    return value


def _read_value(value: Any) -> float | Curve | Each:
    if isinstance(value, dict) and value.keys() == {"each"} and isinstance(value["each"], list):
        return Each(tuple(map(_number, value["each"])))
    return _curve(value) if isinstance(value, (str, list, dict)) else _number(value)


def _curve(value: Any) -> Curve:
    if isinstance(value, str):
        return preset(value)
    if isinstance(value, list):
        if not value:
            raise ParameterError("the gradient is empty; expected at least one number")
        return through([_number(number) for number in value])
    mixed = value.get("mix") if isinstance(value, dict) and len(value) == 1 else None
    if isinstance(mixed, list) and len(mixed) == 3:
        a, b, share = _curve(mixed[0]), _curve(mixed[1]), _number(mixed[2])
        return lambda t: (1 - share) * a(t) + share * b(t)
    number = _number(value)
    return lambda t: number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ParameterError(
            f"{value!r} is no value; expected a number, a list of numbers, the name of a preset, or a mixture of these"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ParameterError(f"{value!r} is no finite number")
    return number


def _about(pattern: str, error: ParameterError) -> ParameterError:
    return ParameterError(f"weights: rule {pattern!r}: {error}")
