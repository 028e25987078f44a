"""Which calls run on tiles, and how the steps of a template are cut into stages.

A call runs on tiles if its method promises that this is the same, and if its tensors all have one shape: then any
flat range of the result needs that range of each input alone. One-element tensors are passed whole. A method that
makes its result in pieces gets entire tensors, but runs on tiles as well. Everything else sees entire tensors, and
what it needs is assembled for it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sd_mecha.extensions.reductions import BLOCK
from sd_mecha.extensions.tile import piece_of
from sd_mecha.planning.arguments import PlannedCall
from sd_mecha.planning.program import Call, Load, Output, Stage, Step, Store, Template, Tiles, Whole
from sd_mecha.planning.shapes import Spec
from sd_mecha.storage.contract import TensorEntry

LARGEST_ROW_TILE = 1 << 22
PIECES = "result in pieces"


def decide(call: PlannedCall, results: Sequence[Spec]) -> tuple[bool, str]:
    """Whether a call runs on tiles, and why."""
    method = call.method
    if method.tiling == "pieces":
        one = len(results) == 1 and isinstance(results[0], TensorEntry)
        if one and (method.in_pieces is None or method.in_pieces(call.relation)):
            return True, PIECES
    if method.tiling not in ("elementwise", "rows"):
        return False, f"{method.identifier} sees entire tensors"
    if len(results) != 1:
        return False, f"{method.identifier} makes several keys at once"
    result = results[0]
    if not isinstance(result, TensorEntry):
        return False, f"{method.identifier} makes a {result.__name__}"
    if any(a.convert is not None for a in (*call.args, *call.kwargs.values())):
        return False, f"a parameter of {method.identifier} is computed from a tensor"
    for slot in call.slots:
        entry = call.specs[slot]
        if not isinstance(entry, TensorEntry):
            if slot not in call.constants:
                return False, f"a parameter of {method.identifier} is computed"
        elif entry.shape != result.shape and entry.numel != 1:
            return False, f"{method.identifier} broadcasts shape {entry.shape} to {result.shape}"
    if method.tiling == "rows":
        row = math.prod(result.shape[1:]) if result.shape else 1
        if len(result.shape) < 2 or math.lcm(max(row, 1), BLOCK) > LARGEST_ROW_TILE:
            return (
                False,
                f"{method.identifier} works on rows, and {result.shape} does not cut into rows of blocks",
            )
        return True, "rows"
    return True, "streamed reduction" if method.streamed else "elementwise"


def cut(template: Template) -> None:
    """Fill in the stages of a template, what is freed after each, and the peak of entire tensors."""
    cutter = _Cutter(template)
    template.stages = tuple(cutter.stages())
    template.frees, template.whole_bytes = _lifetimes(template)


class _Cutter:
    def __init__(self, template: Template) -> None:
        self.template = template
        self.producer: dict[int, Step] = {}
        for step in template.steps:
            for slot in slots_of(step):
                self.producer[slot] = step
        self.position = {id(step): i for i, step in enumerate(template.steps)}
        self.whole: set[int] = set()  # slots that hold entire tensors by now
        self.out: list[Stage] = []

    def stages(self) -> list[Stage]:
        shared = self._shared_slots()
        pending: dict[int, list[Output]] = {}
        for output in self.template.outputs:
            pending.setdefault(output.slot, []).append(output)
        for step in self.template.steps:
            if isinstance(step, Call) and not step.tiled:
                for slot in step.inputs:
                    self._materialise(slot)
                self.out.append(Whole(step))
                self.whole.update(step.slots)
            elif isinstance(step, Call) and step.slots[0] in shared:
                self._materialise(step.slots[0])
            for slot in self.whole.intersection(slots_of(step)):  # written at once, so that it can be freed
                self.out.extend(Store(output) for output in pending.pop(slot, ()))
        groups: dict[tuple[int, ...], list[Output]] = {}
        for slot, outputs in pending.items():
            if slot in self.whole or slot not in self.producer:
                self.out.extend(Store(output) for output in outputs)
            else:  # outputs of one shape run in one stage, so that what they read in common is read once
                groups.setdefault(self._shape(slot), []).extend(outputs)
        for outputs in groups.values():
            self._tiles([o.slot for o in outputs], outputs, [])
        return self.out

    def _materialise(self, slot: int) -> None:
        step = self.producer.get(slot)
        if step is None or slot in self.whole:
            return
        if isinstance(step, Load):
            self.out.append(Whole(step))
            self.whole.add(slot)
        else:
            self._tiles([slot], [], [slot])
            self.whole.add(slot)

    def _tiles(self, targets: list[int], writes: Iterable[Output], keeps: list[int]) -> None:
        numel = self._numel(targets[0])
        needed: dict[int, Step] = {}
        stack = list(targets)
        while stack:
            slot = stack.pop()
            step = self.producer.get(slot)
            if step is None or slot in self.whole or slot in needed:
                continue
            needed[slot] = step
            if isinstance(step, Call) and step.why == PIECES:
                for entire in step.inputs:
                    self._materialise(entire)
            elif isinstance(step, Call):
                stack.extend(step.inputs)
        steps: list[Step] = []
        for step in sorted({id(s): s for s in needed.values()}.values(), key=lambda s: self.position[id(s)]):
            if self._numel(slots_of(step)[0]) != numel:  # one-element inputs of larger tensors
                if isinstance(step, Load):
                    self.out.append(Whole(step))
                else:
                    for slot in step.inputs:
                        self._materialise(slot)
                    self.out.append(Whole(step))
                self.whole.update(slots_of(step))
            else:
                steps.append(step)
        row = self._row(steps)
        frees, deferred = last_uses(steps, targets), self._find_deferred(steps, targets)
        self.out.append(
            Tiles(
                numel,
                tuple(steps),
                frees,
                tuple(writes),
                tuple(keeps),
                deferred,
                math.lcm(row or 1, *(self._piece(step) for step in steps), BLOCK),
                self._element_bytes(steps, frees, deferred, list(writes)),
                row,
            )
        )

    def _row(self, steps: Sequence[Step]) -> int:
        for step in steps:
            if isinstance(step, Call) and step.why == "rows":
                entry = self.template.specs[step.slots[0]]
                assert isinstance(entry, TensorEntry)
                return max(math.prod(entry.shape[1:]), 1)
        return 0

    def _piece(self, step: Step) -> int:
        if isinstance(step, Load) or step.why != PIECES:
            return 1
        return piece_of(self._shape(step.slots[0]))

    def _shared_slots(self) -> set[int]:
        """Results of tiled calls that several groups of outputs read, and that are kept rather than made again."""
        if len(self.template.outputs) < 2:
            return set()
        users: dict[int, set[tuple[int, ...]]] = {}
        for output in self.template.outputs:
            group = self._shape(output.slot)
            stack, seen = [output.slot], set()
            while stack:
                slot = stack.pop()
                step = self.producer.get(slot)
                if slot in seen or not isinstance(step, Call):
                    continue
                seen.add(slot)
                users.setdefault(slot, set()).add(group)
                stack.extend(step.inputs)
        return {
            slot
            for slot, groups in users.items()
            if len(groups) > 1 and isinstance(step := self.producer[slot], Call) and step.tiled and step.reused
        }

    def _shape(self, slot: int) -> tuple[int, ...]:
        spec = self.template.specs[slot]
        return spec.shape if isinstance(spec, TensorEntry) else ()

    def _numel(self, slot: int) -> int:
        spec = self.template.specs[slot]
        return spec.numel if isinstance(spec, TensorEntry) else 1

    def _find_deferred(self, steps: Sequence[Step], targets: Iterable[int]) -> frozenset[int]:
        """Loads that exactly one state dict parameter reads: they can wait until it asks for them."""
        by_key: dict[int, int] = {}
        plain: set[int] = set(targets)
        for step in steps:
            if isinstance(step, Call):
                for arg in step.all_args():
                    for slot in arg.slots:
                        by_key[slot] = by_key.get(slot, 0) + 1
                    if arg.by_key is None:
                        plain.update(arg.slots)
        loads = (step.slot for step in steps if isinstance(step, Load))
        return frozenset(slot for slot in loads if slot not in plain and by_key.get(slot) == 1)

    def _element_bytes(
        self,
        steps: Sequence[Step],
        frees: Sequence[tuple[int, ...]],
        deferred: frozenset[int],
        writes: Sequence[Output],
    ) -> int:
        live = peak = 0
        size: dict[int, int] = {}
        for step, freed in zip(steps, frees, strict=True):
            if isinstance(step, Load):
                wide = step.dtype.itemsize
                size[step.slot] = 0 if step.slot in deferred else wide
                peak = max(peak, live + wide + step.stored.dtype.itemsize)
            else:
                for slot in step.slots:
                    spec = self.template.specs[slot]
                    size[slot] = spec.dtype.itemsize if isinstance(spec, TensorEntry) else 0
                # the result, and twice as much again for what the method needs on its way
                peak = max(peak, live + 3 * max(size[s] for s in step.slots))
            live += sum(size[s] for s in slots_of(step)) - sum(size[s] for s in freed)
            peak = max(peak, live)
        return peak + sum(o.entry.dtype.itemsize for o in writes)


def slots_of(step: Step) -> tuple[int, ...]:
    return (step.slot,) if isinstance(step, Load) else step.slots


def last_uses(steps: Sequence[Step], keep: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """For each step the slots that no later step needs; `keep` are needed after the last."""
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for slot in slots_of(step):
            last[slot] = i
        if isinstance(step, Call):
            for slot in step.inputs:
                if slot in last:
                    last[slot] = i
    frees: list[list[int]] = [[] for _ in steps]
    kept = set(keep)
    for slot, i in last.items():
        if slot not in kept:
            frees[i].append(slot)
    return tuple(tuple(f) for f in frees)


def _lifetimes(template: Template) -> tuple[tuple[tuple[int, ...], ...], int]:
    """What can be freed after each stage, and the peak bytes of the entire tensors alive."""
    made: list[tuple[int, ...]] = []
    used: list[set[int]] = []
    for stage in template.stages:
        if isinstance(stage, Whole):
            step = stage.step
            made.append(slots_of(step))
            used.append(set(step.inputs) if isinstance(step, Call) else set())
        elif isinstance(stage, Store):
            made.append(())
            used.append({stage.output.slot})
        else:
            made.append(stage.keeps)
            used.append({s for step in stage.steps if isinstance(step, Call) for s in step.inputs})
    whole = {s for slots in made for s in slots}
    last = {slot: i for i, slots in enumerate(used) for slot in slots if slot in whole}
    frees: list[list[int]] = [[] for _ in template.stages]
    for i, slots in enumerate(made):
        for slot in slots:
            frees[last.get(slot, i)].append(slot)
    live = peak = 0
    for i, slots in enumerate(made):
        sizes = [s.nbytes for s in (template.specs[slot] for slot in slots) if isinstance(s, TensorEntry)]
        live += sum(sizes)
        # an entire-tensor call is reckoned to need as much again as its results while it runs
        stage = template.stages[i]
        scratch = sum(sizes) if isinstance(stage, Whole) and isinstance(stage.step, Call) else 0
        peak = max(peak, live + scratch)
        gone = (template.specs[slot] for slot in frees[i])
        live -= sum(s.nbytes for s in gone if isinstance(s, TensorEntry))
    return tuple(tuple(f) for f in frees), peak
