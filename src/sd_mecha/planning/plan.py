"""The plan of a merge: everything worth deciding, decided from file headers alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sd_mecha.errors import AdapterError, EmptyMergeError, PlanError, ShapeError
from sd_mecha.extensions.merge_spaces import MergeSpace
from sd_mecha.extensions.model_configs import ModelConfig, is_stub
from sd_mecha.planning import explain
from sd_mecha.planning.bench import Precision, Target, Workbench
from sd_mecha.planning.configs import solve_configs
from sd_mecha.planning.finalize import fill_in
from sd_mecha.planning.interfaces import choose_implementations
from sd_mecha.planning.keys import KeyMaps, Missing, Source, solve_keys
from sd_mecha.planning.markers import is_marker
from sd_mecha.planning.opening import OpenModels, open_models
from sd_mecha.planning.program import Callee, Load, Program, Template
from sd_mecha.planning.programs import build, plan_programs
from sd_mecha.planning.spaces import SpaceFacts, solve_spaces
from sd_mecha.planning.trail import describe
from sd_mecha.planning.uses import unshare
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
    strict_adapters: bool = False


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
    skipped: frozenset[Source] = frozenset()  # what methods skip by name, found while planning

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
            gone = self._everywhere({*missing, *self.skipped}, target)
            facts = solve_keys([target.root], self.models, target.configs, gone, self.bench.key_maps)
            targets.append(Target(target.root, target.configs, facts))
        bench = Workbench(
            self.models, targets, self.options.precision, self.bench.caches, self.bench.nodes, self.bench.callables,
            origins=self.bench.origins, called=self.bench.called, key_maps=self.bench.key_maps,
            instances=self.bench.instances,
        )  # fmt: skip
        wanted: dict[str, list[int]] = {}
        lost = []
        for number, key, _ in program.outputs:
            facts = targets[number].facts
            if key in facts.available[targets[number].root] or key in facts.carried:
                wanted.setdefault(key, []).append(number)
            else:
                lost.append((number, key))
        if not wanted:
            return None, lost
        template = build(bench, wanted, declared=self.outputs)
        _raise_problems(bench)
        return Program(template, program.key), lost

    def _everywhere(self, missing: Missing, target: Target) -> set[tuple[RecipeNode, str]]:
        """A tensor that is missing from a file is so for every node of that file, under the key that it stands for."""
        places: dict[int, list[RecipeNode]] = {}
        for node, number in self.models.index.items():
            places.setdefault(number, []).append(node)
        found = set(missing)
        for node, name in missing:
            for other in places.get(self.models.index.get(node, -1), ()):
                names = target.facts.stored.get(other, {})
                found.add((other, next((key for key, stored in names.items() if stored == name), name)))
        return found

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
    solved = []
    caches = dict(options.caches)
    for given in map(unshare, roots):
        root = choose_implementations(given, models)
        if root is not given:  # a caller knows a node by the interface that it calls
            known = [node for node in toposort(given) if node in options.caches]
            caches.update((choose_implementations(node, models), options.caches[node]) for node in known)
        spaces, configs = _solve(root, models, options)
        check_models(root, models, configs, options.strict_mandatory_keys, options.check_extra_keys)
        solved.append((root, spaces, configs))
    skipped: set[Source] = set()
    key_maps = KeyMaps()
    instances: dict[RecipeNode, Any] = {}
    while True:
        targets, keys = [], []
        for root, _, configs in solved:
            facts = solve_keys([root], models, configs, skipped, key_maps)
            targets.append(Target(root, configs, facts))
            names = _order(root, models, facts.available[root])
            if not (names or options.allow_empty_merge or facts.skips or skipped):
                raise EmptyMergeError(_why_empty(root, models, configs, facts.available))
            keys.append([*names, *facts.carried])
        bench = Workbench(models, targets, options.precision, caches, key_maps=key_maps, instances=instances)
        programs = plan_programs(bench, keys, options.memoize_intermediates)
        if not bench.skipped:
            break
        skipped |= bench.skipped  # without them other inputs may take their place: solved anew
    _raise_problems(bench)
    _say(targets, options.strict_adapters)
    layouts: list[dict[str, TensorEntry]] = [{} for _ in roots]
    for program in programs:
        for number, key, entry in program.outputs:
            layouts[number][key] = entry
    spaces_of = [spaces for _, spaces, _ in solved]
    return Plan([t.root for t in targets], programs, layouts, bench, options, spaces_of, frozenset(skipped))


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


def _say(targets: Iterable[Target], strict: bool) -> None:
    """Warn of what key maps leave out of their inputs, or refuse it."""
    reports: dict[str, bool] = {}
    for target in targets:
        for text, is_refused in target.facts.reports.items():
            reports[text] = reports.get(text, strict) or is_refused
    if refused := [text for text, is_refused in reports.items() if is_refused]:
        raise AdapterError(refused)
    for text in reports:
        _logger.warning("%s", text)


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
    first: dict[int, tuple[str, Iterable[str]]] = {}
    for node in toposort(root):
        if not isinstance(node, ModelRecipeNode):
            continue
        config, reader = configs[node], models[node]
        if is_stub(config) or (models.index[node], id(config)) in checked:
            continue
        checked.add((models.index[node], id(config)))
        present = {config.resolve_alias(name) for name in reader.entries}
        if check_extra_keys and (extra := sorted(k for k in present - config.keys().keys() if not is_marker(k))):
            unknown = "in every input" if config.identifier == "structural" else f"in config {config.identifier}"
            _logger.warning(
                "%s: %d of %d keys are not %s and are left out, such as %s",
                reader.name, len(extra), len(present), unknown, ", ".join(map(repr, extra[:3])),
            )  # fmt: skip
        if check_mandatory_keys:
            place = models.created(node, config, config.keys().keys() - present)
            if place is not None:
                present.update(models.readers[place].entries)
            if config.identifier == "structural":  # the keys of the first model are the mandatory ones
                name, mandatory = first.setdefault(id(config), (reader.name, list(reader.entries)))
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


def _why_empty(
    root: RecipeNode, models: OpenModels, configs: Mapping[RecipeNode, ModelConfig], available: Mapping[Any, Any]
) -> str:
    inputs = [n for n in toposort(root) if isinstance(n, ModelRecipeNode)]
    if not inputs:
        what = f"it holds no model (its root is {describe(root)})"
        return f"the recipe makes no key: {what}; begin with sd_mecha.model(path)"

    def usable(node: ModelRecipeNode) -> str:
        config, entries = configs[node].identifier, models[node].entries
        unit = "keys that all inputs have" if config == "structural" else f"keys of {config}"
        example = f", such as {next(iter(entries))!r}" if entries else ""
        return f"{describe(node)} has {len(available[node])} {unit}, of {len(entries)}{example}"

    counts = "; ".join(map(usable, inputs[:6]))
    more = f"; and {len(inputs) - 6} more" if len(inputs) > 6 else ""
    return (
        f"the recipe makes no key: no key can be made from its inputs ({counts}{more}); "
        "pass allow_empty_merge=True if that is intended"
    )
