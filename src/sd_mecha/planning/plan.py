"""The plan of a merge: everything worth deciding, decided from file headers alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sd_mecha.errors import EmptyMergeError, PlanError, ShapeError
from sd_mecha.extensions.merge_spaces import MergeSpace
from sd_mecha.extensions.model_configs import ModelConfig, is_stub
from sd_mecha.planning import explain
from sd_mecha.planning.bench import Precision, Target, Workbench
from sd_mecha.planning.configs import solve_configs
from sd_mecha.planning.finalize import fill_in
from sd_mecha.planning.interfaces import choose_implementations
from sd_mecha.planning.keys import Missing, solve_keys
from sd_mecha.planning.opening import OpenModels, open_models
from sd_mecha.planning.program import Callee, Load, Program, Template
from sd_mecha.planning.programs import build, plan_programs
from sd_mecha.planning.spaces import SpaceFacts, solve_spaces
from sd_mecha.planning.trail import describe
from sd_mecha.recipes.nodes import ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.storage.contract import Reader, TensorEntry

_logger = logging.getLogger("sd_mecha")
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class PlanOptions:
    """What planning needs to know of the options of merging."""

    precision: Precision
    strict_merge_space: frozenset[MergeSpace] | None = None
    strict_mandatory_keys: bool = False
    check_extra_keys: bool = True
    allow_empty_merge: bool = False
    memoize_intermediates: bool = True
    caches: Mapping[RecipeNode, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """Programs for every output key, and the readers they read from. Printing it explains it.

    A plan holds its models open: close it, or use it as a context manager.
    """

    roots: Sequence[RecipeNode]
    programs: Sequence[Program]
    outputs: Sequence[Mapping[str, TensorEntry]]  # one layout for each root
    bench: Workbench
    options: PlanOptions
    spaces: Sequence[SpaceFacts]

    @property
    def models(self) -> OpenModels:
        return self.bench.models

    @property
    def readers(self) -> Sequence[Reader]:
        return self.bench.models.readers

    @property
    def callables(self) -> Sequence[Callee]:
        return self.bench.callables

    @property
    def keys(self) -> int:
        """Number of tensors that are written."""
        return sum(len(o) for o in self.outputs)

    @property
    def templates(self) -> list[Template]:
        return list({id(p.template): p.template for p in self.programs}.values())

    @property
    def bytes_written(self) -> int:
        return sum(entry.nbytes for layout in self.outputs for entry in layout.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of the distinct tensors that are read, each counted once."""
        per_template: dict[int, int] = {}
        total = 0
        for program in self.programs:
            template = program.template
            if id(template) not in per_template:
                loads = {(s.reader, s.name): s.stored.nbytes for s in template.steps if isinstance(s, Load)}
                per_template[id(template)] = sum(loads.values())
            total += per_template[id(template)]
        return total

    @property
    def peak_memory(self) -> int:
        """Estimated bytes of tensors alive at once, for two workers."""
        return explain.peak_memory(self, workers=2)

    def metadata(self, target: int = 0) -> dict[str, str]:
        """The metadata of the first model of a root."""
        for node in toposort(self.roots[target]):
            if isinstance(node, ModelRecipeNode):
                return dict(self.models[node].metadata)
        return {}

    def without(self, program: Program, missing: Missing) -> tuple[Program | None, list[tuple[int, str]]]:
        """What makes the outputs of `program` now that some (origin, key) turned out to be missing.

        Returns:
            The program, None where nothing is left of it; and the outputs that cannot be made any more.
        """
        targets = []
        for target in self.bench.targets:
            facts = solve_keys([target.root], self.models, target.configs, missing)
            targets.append(Target(target.root, target.configs, facts))
        bench = Workbench(
            self.models, targets, self.options.precision, self.options.caches, self.bench.nodes, self.bench.callables,
            origins=self.bench.origins, called=self.bench.called,
        )  # fmt: skip
        wanted: dict[str, list[int]] = {}
        lost = []
        for number, key, _ in program.outputs:
            if key in targets[number].facts.available[targets[number].root]:
                wanted.setdefault(key, []).append(number)
            else:
                lost.append((number, key))
        if not wanted:
            return None, lost
        template = build(bench, wanted)
        _raise_problems(bench)
        for output in template.outputs:
            assert output.name is not None
            declared = self.outputs[output.target][output.name]
            if output.entry.shape != declared.shape:
                raise ShapeError(
                    f"key {output.name!r}: without the missing input the result has shape {output.entry.shape}, "
                    f"but {declared.shape} is laid out in the output"
                )
        return Program(template, program.key), lost

    def finalized(self, target: int = 0) -> RecipeNode:
        """A root with the configs and merge spaces that were inferred."""
        return fill_in(self.roots[target], self.bench.targets[target].configs, self.spaces[target])

    def origin(self, number: int) -> RecipeNode:
        return self.bench.nodes[number]

    def explain(self, workers: int = 2) -> str:
        return explain.explain(self, workers)

    def __str__(self) -> str:
        return self.explain()

    def close(self) -> None:
        self.models.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def make_plan(roots: Sequence[RecipeNode], options: PlanOptions) -> Plan:
    """Plan the merge of some recipes in one pass.

    Raises:
        PlanError: the recipes contradict themselves; subclasses say how, and list every contradiction found.
    """
    with _collector_paused():
        models = open_models(*roots)
        try:
            return _plan(roots, models, options)
        except BaseException:
            models.close()
            raise


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A large plan is many small objects that all stay: looking for garbage among them only takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _plan(roots: Sequence[RecipeNode], models: OpenModels, options: PlanOptions) -> Plan:
    targets, keys, solved = [], [], []
    for root in roots:
        root = choose_implementations(root, models)
        spaces, configs = _solve(root, models, options)
        facts = solve_keys([root], models, configs)
        targets.append(Target(root, configs, facts))
        solved.append(spaces)
        strict, extra = options.strict_mandatory_keys, options.check_extra_keys
        check_models(root, models, configs, strict, extra)
        names = _order(root, models, facts.available[root])
        if not (names or options.allow_empty_merge or facts.skips):
            raise EmptyMergeError(_why_empty(root, configs, facts.available))
        keys.append(names)
    bench = Workbench(models, targets, options.precision, options.caches)
    programs = plan_programs(bench, keys, options.memoize_intermediates)
    _raise_problems(bench)
    layouts: list[dict[str, TensorEntry]] = [{} for _ in roots]
    for program in programs:
        for number, key, entry in program.outputs:
            layouts[number][key] = entry
    return Plan([t.root for t in targets], programs, layouts, bench, options, solved)


def _solve(
    root: RecipeNode, models: OpenModels, options: PlanOptions
) -> tuple[SpaceFacts, Mapping[RecipeNode, ModelConfig]]:
    """Merge spaces and configs; contradictions of both are reported together."""
    spaces = configs = None
    errors: list[PlanError] = []
    try:
        spaces = solve_spaces(root, options.strict_merge_space)
    except PlanError as error:
        errors.append(error)
    try:
        configs = solve_configs(root, models).as_mapping()
    except PlanError as error:
        errors.append(error)
    if spaces is None or configs is None:
        raise type(errors[0])([line for error in errors for line in error.problems])
    return spaces, configs


def _raise_problems(bench: Workbench) -> None:
    if bench.problems:
        shown = list(bench.problems)[:SHOWN_PROBLEMS]
        if rest := len(bench.problems) - len(shown):
            shown.append(f"... and {rest} more")
        raise ShapeError(shown)


def _order(root: RecipeNode, models: OpenModels, available: Collection[str]) -> list[str]:
    """Output keys in the order of the first model's data, so that reading runs forward through the files."""
    names: dict[str, None] = {}
    for node in toposort(root):
        if isinstance(node, ModelRecipeNode):
            names.update(dict.fromkeys(k for k in models[node].entries if k in available))
            if len(names) == len(available):
                break
    names.update(dict.fromkeys(sorted(k for k in available if k not in names)))
    return list(names)


def check_models(
    root: RecipeNode,
    models: OpenModels,
    configs: Mapping[RecipeNode, ModelConfig],
    check_mandatory_keys: bool,
    check_extra_keys: bool,
) -> None:
    """Report keys that a config does not know, and mandatory ones that a model lacks."""
    problems: list[str] = []
    checked: set[tuple[int, int]] = set()
    first: dict[str, tuple[str, Iterable[str]]] = {}
    for node in toposort(root):
        if not isinstance(node, ModelRecipeNode):
            continue
        config, reader = configs[node], models[node]
        if is_stub(config) or (models.index[node], id(config)) in checked:
            continue
        checked.add((models.index[node], id(config)))
        present = {config.resolve_alias(name) for name in reader.entries}
        if check_extra_keys and (extra := sorted(present - config.keys().keys())):
            _logger.warning(
                "%s: %d of %d keys are not in config %s and are left out, such as %s",
                reader.name, len(extra), len(present), config.identifier, ", ".join(map(repr, extra[:3])),
            )  # fmt: skip
        if check_mandatory_keys:
            if config.identifier == "structural":  # the keys of the first model are the mandatory ones
                name, mandatory = first.setdefault("structural", (reader.name, list(reader.entries)))
                lacking = [k for k in mandatory if k not in present]
                problems += [f"{reader.name} lacks key {k!r}, which {name} has" for k in lacking]
            else:
                problems += [
                    f"{reader.name} lacks mandatory key {k!r} of {config.identifier}"
                    + (f" (also tried {', '.join(map(repr, m.aliases))})" if m.aliases else "")
                    for k, m in config.keys().items()
                    if k not in present and not m.optional
                ]
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        rest = len(problems) - len(shown)
        raise PlanError([*shown, *([f"... and {rest} more"] if rest else [])])


def _why_empty(root: RecipeNode, configs: Mapping[RecipeNode, ModelConfig], available: Mapping[Any, Any]) -> str:
    inputs = [n for n in toposort(root) if isinstance(n, ModelRecipeNode)]
    if not inputs:
        return f"the recipe makes no key: it holds no model (its root is {describe(root)})"
    counts = "; ".join(f"{describe(n)}: {len(available[n])} usable keys as {configs[n].identifier}" for n in inputs[:6])
    more = f"; and {len(inputs) - 6} more" if len(inputs) > 6 else ""
    return (
        f"the recipe makes no key: no key can be made from its inputs ({counts}{more}); "
        "pass allow_empty_merge=True if that is intended"
    )
