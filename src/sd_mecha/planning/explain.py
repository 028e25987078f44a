"""A plan in words, as a database's EXPLAIN gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd_mecha.planning.program import Call, Load, Program, Store, Template, Tiles, Whole
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.dtypes import dtype_name
from sd_mecha.units import format_size

if TYPE_CHECKING:
    from sd_mecha.planning.plan import Plan

SHOWN_INPUTS = 20
SHOWN_GROUPS = 12
SHOWN_STEPS = 16
TILE_BYTES = 4 << 20


def peak_memory(plan: Plan, workers: int) -> int:
    """Tile buffers of all workers, and the largest entire tensors that may be alive with them."""
    largest = sorted((p.template.whole_bytes for p in plan.programs), reverse=True)[: max(workers, 1)]
    return TILE_BYTES * max(workers, 1) + sum(largest)


def explain(plan: Plan, workers: int) -> str:
    return "\n".join(_lines(plan, workers))


def _lines(plan: Plan, workers: int) -> Iterator[str]:
    names = Counter(reader.name for reader in plan.readers)
    yield f"inputs: {len(plan.readers)}, {format_size(plan.bytes_read)} to read"
    for name, count in list(names.items())[:SHOWN_INPUTS]:
        readers = [r for r in plan.readers if r.name == name]
        keys = sum(len(r.entries) for r in readers)
        size = sum(e.nbytes for r in readers for e in r.entries.values())
        times = f" x{count}" if count > 1 else ""
        yield f"  {name}{times}: {keys} keys, {format_size(size)}"
    if len(names) > SHOWN_INPUTS:
        yield f"  ... and {len(names) - SHOWN_INPUTS} more"
    for number, (root, layout) in enumerate(zip(plan.roots, plan.outputs, strict=True)):
        which = f" {number + 1}" if len(plan.outputs) > 1 else ""
        config = plan.bench.targets[number].configs[root].identifier
        dtypes = ", ".join(sorted({dtype_name(e.dtype) for e in layout.values()})) or "nothing"
        size = sum(e.nbytes for e in layout.values())
        yield f"output{which}: {len(layout)} keys as {config}, {dtypes}, {format_size(size)} to write"
    yield f"peak memory of tensors: about {format_size(peak_memory(plan, workers))} with {workers} workers"
    yield from _groups(plan)


def _groups(plan: Plan) -> Iterator[str]:
    groups: dict[tuple[str, ...], list[Program]] = {}
    for program in plan.programs:
        groups.setdefault(tuple(_shape_free(plan, program.template)), []).append(program)
    yield f"programs: {len(plan.programs)} from {len(plan.templates)} templates, in {len(groups)} groups"
    ordered = sorted(groups.items(), key=lambda item: -sum(_written(p) for p in item[1]))
    for lines, programs in ordered[:SHOWN_GROUPS]:
        keys = [name for p in programs for _, name, _ in p.outputs]
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        yield f"- {keys[0]}{more}: {format_size(sum(_written(p) for p in programs))}"
        yield from (f"    {line}" for line in lines[:SHOWN_STEPS])
        if len(lines) > SHOWN_STEPS:
            yield f"    ... and {len(lines) - SHOWN_STEPS} more steps"
    if len(groups) > SHOWN_GROUPS:
        yield f"- ... and {len(groups) - SHOWN_GROUPS} more groups"


def _written(program: Program) -> int:
    return sum(entry.nbytes for _, _, entry in program.outputs)


def _shape_free(plan: Plan, template: Template) -> Iterator[str]:
    for stage in template.stages:
        if isinstance(stage, Tiles):
            for step in stage.steps:
                yield "tiles  " + _step(plan, template, step)
            for output in stage.writes:
                yield f"tiles  write {dtype_name(output.entry.dtype)}"
            for slot in stage.keeps:
                yield f"tiles  keep %{slot} as an entire tensor"
        elif isinstance(stage, Whole):
            yield "whole  " + _step(plan, template, stage.step)
        elif isinstance(stage, Store):
            yield f"whole  write {dtype_name(stage.output.entry.dtype)}"


def _step(plan: Plan, template: Template, step: Load | Call) -> str:
    if isinstance(step, Load):
        name = f" {step.name!r}" if isinstance(step.name, str) else ""
        cast = "" if step.dtype == step.stored.dtype else f" as {dtype_name(step.dtype)}"
        return f"%{step.slot} = read {plan.readers[step.reader].name}{name} {dtype_name(step.stored.dtype)}{cast}"
    method = plan.callables[step.target].method
    values = [f"%{s}" if s not in template.constants else _constant(template.constants[s]) for s in step.inputs]
    shown = ", ".join(values if len(values) <= 8 else [*values[:6], f"... {len(values)} inputs"])
    slots = ", ".join(f"%{s}" for s in step.slots[:4]) + (", ..." if len(step.slots) > 4 else "")
    return f"{slots} = {method.identifier}({shown})  [{step.why}]"


def _constant(value: object) -> str:
    if hasattr(value, "item") and getattr(value, "numel", lambda: 0)() == 1:
        return f"{value.item():g}" if not isinstance(value.item(), bool) else str(value.item())
    return repr(value) if not isinstance(value, TensorEntry) else str(value.shape)
