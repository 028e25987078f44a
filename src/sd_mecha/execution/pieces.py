"""Results that are made in pieces, and sums that they go into without being made.

A method with `tiling="pieces"` sees entire tensors; what it finds out from them is found once for a tensor, where the
method has a `prepare`. A weighted sum (a method that says so by `sum_of`) whose second term is such a result, needed
for nothing else, is added up in place: that spares a tile in memory, and passes over it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sd_mecha.execution.evaluate import Caller
from sd_mecha.extensions.tile import Tile
from sd_mecha.planning.program import Call, Load, Program, Tiles
from sd_mecha.planning.tiling import PIECES

Maker = Callable[[Tile], Any]
"""Makes a range of a result; one that is `addable` has `add_to` and `join` besides, see `merge_methods`."""


@dataclass(frozen=True)
class Sum:
    """A call that makes `total + weight * addend`.

    Attributes:
        total, addend: the slots of its terms.
        weight: the number.
        in_place: whether nobody else sees the tensor of `total`.
        maker: what adds the addend, which is not made; None where the sum that is `total` has it already.
    """

    total: int
    addend: int
    weight: float
    in_place: bool
    maker: Any

    def add(self, values: Mapping[int, Any], tile: Tile) -> Tensor:
        """The sum on one tile."""
        total: Tensor = values[self.total]
        if not self.in_place:
            total = total.clone(memory_format=torch.contiguous_format)
        if self.maker is not None:
            self.maker.add_to(total, tile, self.weight)
        return total


@dataclass(frozen=True)
class Work:
    """A tile stage with what all of its tiles have in common.

    Attributes:
        fixed: constants, as every tile sees them.
        cut: entire tensors of which each tile sees its range, flat.
        makers: by slot, what makes the results in pieces.
        sums: by slot, the sums that are added up in place.
        unmade: slots of their addends.
        row: the shape of a row where a step sees rows, else None.
    """

    stage: Tiles
    fixed: Mapping[int, Any]
    cut: Mapping[int, Tensor]
    makers: Mapping[int, Maker] = field(default_factory=dict)
    sums: Mapping[int, Sum] = field(default_factory=dict)
    unmade: frozenset[int] = frozenset()
    row: tuple[int, ...] | None = None

    def values(self, start: int, stop: int) -> dict[int, Any]:
        """What the steps find on a tile before any of them has run."""
        values = dict(self.fixed)
        for slot, whole in self.cut.items():
            values[slot] = self.shaped(whole[start:stop])
        return values

    def shaped(self, flat: Tensor) -> Tensor:
        """A tile as the steps see it."""
        return flat if self.row is None else flat.reshape(-1, *self.row)


def prepare(stage: Tiles, program: Program, values: MutableMapping[int, Any], caller: Caller) -> Work:
    """Find what the tiles of a stage have in common.

    Args:
        values: constants and entire tensors.

    Raises:
        Missing: a method skips this key.
    """
    template = program.template
    fixed: dict[int, Any] = {}
    cut: dict[int, Tensor] = {}
    seen = {slot for step in stage.steps if isinstance(step, Call) and step.why != PIECES for slot in step.inputs}
    seen.update(output.slot for output in stage.writes)
    for slot in (seen & values.keys()).difference(stage.keeps):
        value = values[slot]
        if not isinstance(value, Tensor):
            fixed[slot] = value
        elif value.numel() == stage.numel and slot not in template.constants:
            cut[slot] = value.reshape(-1)
        else:
            fixed[slot] = value.reshape(()) if value.numel() == 1 else value
    makers = {}
    row = None
    for step in stage.steps:
        if isinstance(step, Call) and step.why in (PIECES, "rows"):
            shape = template.shape(step.slots[0])
            if step.why == PIECES:
                makers[step.slots[0]] = caller.maker(step, values, program, Tile(0, stage.numel, stage.numel, shape))
            else:
                row = shape[1:]
    sums = _sums(stage, program, caller, makers)
    _join(sums)
    unmade = frozenset(found.addend for found in sums.values())
    kept = {slot: maker for slot, maker in makers.items() if slot not in unmade}  # the others hold tensors
    return Work(stage, fixed, cut, kept, sums, unmade, row)


def _sums(stage: Tiles, program: Program, caller: Caller, makers: Mapping[int, Any]) -> dict[int, Sum]:
    """The calls of a stage that can add an addend that is not made, in their order."""
    addable = {slot for slot, maker in makers.items() if getattr(maker, "addable", False)}
    if not addable:
        return {}
    specs, constants = program.template.specs, program.template.constants
    uses = Counter(slot for step in stage.steps if isinstance(step, Call) for slot in step.inputs)
    uses.update(output.slot for output in stage.writes)
    uses.update(stage.keeps)
    owned = {step.slot for step in stage.steps if isinstance(step, Load)}
    made = owned | {step.slots[0] for step in stage.steps if isinstance(step, Call)}
    found: dict[int, Sum] = {}
    for step in stage.steps:
        terms = None if isinstance(step, Load) else _terms(step, caller)
        if isinstance(step, Load) or terms is None:
            continue
        total, addend, alpha = terms
        weight = _weight(constants.get(alpha))
        one_dtype = specs[total] == specs[addend] == specs[step.slots[0]]
        if addend in addable and uses[addend] == 1 and total in made and one_dtype and weight is not None:
            in_place = total in owned and uses[total] == 1
            found[step.slots[0]] = Sum(total, addend, weight, in_place, makers[addend])
            owned.add(step.slots[0])
    return found


def _join(sums: dict[int, Sum]) -> None:
    """Let sums of sums be added up at once by the first of them, where their addends can be joined."""
    runs: list[list[int]] = []
    for slot, one in sums.items():
        if runs and one.in_place and one.total == runs[-1][-1] and _alike(one.maker, sums[one.total].maker):
            runs[-1].append(slot)
        else:
            runs.append([slot])
    for first, *rest in runs:
        if rest:
            one = sums[first]
            joined = one.maker.join([(sums[slot].maker, sums[slot].weight) for slot in (first, *rest)])
            sums[first] = replace(one, weight=1.0, maker=joined)
            for slot in rest:
                sums[slot] = replace(sums[slot], maker=None)


def _alike(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one.form == other.form)


def _terms(step: Call, caller: Caller) -> Sequence[int] | None:
    """The slots of total, addend and weight of a call that makes a sum; None for other calls."""
    method = caller.method(step)
    if method.sum_of is None:
        return None
    arguments = dict(zip(method.declaration.names.args, step.args, strict=False)) | dict(step.kwargs)
    found = [arguments[name] for name in method.sum_of]
    return [arg.slot for arg in found] if all(arg.by_key is None and arg.convert is None for arg in found) else None


def _weight(value: Any) -> float | None:
    """A constant by which an addend can be multiplied unseen; with 0, or what is not finite, the method decides."""
    if not isinstance(value, Tensor) or value.dim() or value.device.type != "cpu":
        return None
    number = float(value)
    return number if number and math.isfinite(number) else None
