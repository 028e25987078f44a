"""From solved keys to programs: one for each output key, or for each group of keys that one call makes together.

Most recipes map key k to key k. Their programs differ between keys only by what the sources hold, so keys whose
sources have equal shapes, dtypes and constants share one template; finding it costs one look at each source.
Recipes that rename or regroup keys are built for each key or group; templates that differ by names alone are kept once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch

from sd_mecha.errors import RecipeTypeError, ShapeError, StateDictKeyError
from sd_mecha.extensions.method import method_of
from sd_mecha.planning.arguments import context, convert_constant
from sd_mecha.planning.bench import Target, Workbench
from sd_mecha.planning.builder import Builder, Instance
from sd_mecha.planning.keys import KeyFacts
from sd_mecha.planning.markers import is_marker
from sd_mecha.planning.program import Output, Program, Template
from sd_mecha.planning.sharing import SharedTemplates
from sd_mecha.planning.tiling import cut
from sd_mecha.planning.unify import Classes
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.storage.contract import TensorEntry

_MOST_BITS = 14_000  # Python writes no number of more than 4,300 digits, which messages and signatures hold


def plan_programs(bench: Workbench, keys: Sequence[Sequence[str]], memoize: bool) -> list[Program]:
    """The programs that make `keys[i]` of target i, in the order of the keys.

    Problems with shapes are collected in `bench.problems`.
    """
    wanted: dict[str, list[int]] = {}
    for target, names in enumerate(keys):
        for key in names:
            wanted.setdefault(key, []).append(target)
    signatures = [Signatures(bench, target) for target in bench.targets]
    templates: dict[object, Template] = {}
    programs: dict[str, Program] = {}
    renamed: list[str] = []
    for key, targets in wanted.items():
        signature = tuple(signatures[target].of(key) for target in targets)
        if None in signature:
            renamed.append(key)
            continue
        memo = (signature, tuple(targets), is_marker(key))
        template = templates.get(memo)
        if template is None:
            skips = len(bench.skipped)
            template = build(bench, {key: targets}, shared_key=key)
            if len(bench.skipped) == skips:  # otherwise it tells of this key only
                templates[memo] = template
        programs[key] = Program(template, key)
    shared = SharedTemplates(cut)
    for group in _groups(bench, renamed, wanted, memoize):
        programs[group[0]] = shared.program(_template(bench, {key: wanted[key] for key in group}), group[0])
    return [programs[key] for key in wanted if key in programs]


def build(
    bench: Workbench,
    wanted: Mapping[str, Iterable[int]],
    shared_key: str | None = None,
    declared: Sequence[Mapping[str, TensorEntry]] = (),
) -> Template:
    """One template that makes some keys of some targets.

    Args:
        declared: the layouts that the outputs already have, by target; empty while there are none.

    Raises:
        ShapeError: a result does not fit the layout.
    """
    template = _template(bench, wanted, shared_key)
    if declared:
        template.outputs = tuple(_as_declared(output, declared) for output in template.outputs)
    cut(template)
    return template


def _template(bench: Workbench, wanted: Mapping[str, Iterable[int]], shared_key: str | None = None) -> Template:
    """A template before it is cut into stages."""
    builder = Builder(bench, shared_key)
    for key, targets in wanted.items():
        for target in targets:
            builder.add_output(target, key)
    return builder.finish()


def _as_declared(output: Output, declared: Sequence[Mapping[str, TensorEntry]]) -> Output:
    """An output in the dtype that its place in the layout has."""
    assert isinstance(output.name, str)
    entry = declared[output.target][output.name]
    if output.entry.shape != entry.shape:
        raise ShapeError(
            f"key {output.name!r}: without the missing input the result has shape {output.entry.shape}, "
            f"but {entry.shape} is laid out in the output"
        )
    return replace(output, entry=entry)


class Signatures:
    """What tells the programs of two keys apart, for recipes that map key k to key k."""

    def __init__(self, bench: Workbench, target: Target) -> None:
        self.bench = bench
        self.target = target
        self.models = bench.models
        self.facts = facts = target.facts
        self.sources: list[RecipeNode] = []
        order = toposort(target.root)
        _check_numbers(order)
        broadcast = {
            node
            for node in order
            if node in facts.chosen and all(_is_singleton(target, child) for child in node.children)
        }
        inside = {child for node in broadcast for child in node.children}
        for node in order:
            leaf = not isinstance(node, MergeRecipeNode)
            mapped = node in facts.chosen or node in facts.realized
            if (leaf or mapped) and node not in broadcast and not (leaf and node in inside):
                self.sources.append(node)
        self.by_key = {node: self._plain_arguments(node, broadcast) for node in order if _differs_by_key(node, facts)}

    def of(self, key: str) -> tuple[Any, ...] | None:
        """The signature of a key; None where some source feeds it from another key."""
        facts, models = self.facts, self.models
        if key in facts.carried:
            return None
        parts: list[Any] = []
        for node in self.sources:
            if key not in facts.available[node]:
                parts.append(None)
            elif isinstance(node, ModelRecipeNode):
                entry = None if key in facts.stored.get(node, ()) else models[node].entries.get(key)
                if entry is None:  # stored under another name, or made by the config
                    return None
                parts.append(entry)
            elif isinstance(node, LiteralRecipeNode):
                parts.append(_value_token(node.value_dict[key]))
            elif node in facts.chosen:
                source = facts.chosen[node](key)
                assert source is not None
                if source[1] != key:
                    return None
                parts.append(source[0].fingerprint)
            else:
                relation = facts.realized[node][key]
                if relation.outputs != (key,) or any(k not in ((key,), ()) for k in relation.inputs.values()):
                    return None
                parts.append((tuple((p, bool(k)) for p, k in relation.inputs.items()), id(relation.meta)))
        for node, arguments in self.by_key.items():
            parts.append(self._result(node, arguments, key) if key in facts.available[node] else None)
        return tuple(parts)

    def _plain_arguments(
        self, node: MergeRecipeNode, broadcast: Collection[RecipeNode]
    ) -> tuple[list[Any], dict[str, Any]] | None:
        """The arguments of a call for which numbers and strings stand in the recipe; None if there are others."""
        values: list[Any] = []
        for _, data, child in self.bench.bound(node):
            source, at = self._source(child) if child in broadcast else (None, "")
            value = source.value_dict[at] if isinstance(source, LiteralRecipeNode) else source
            if value is source or isinstance(value, (RecipeNode, torch.Tensor)):
                return None
            values.append(convert_constant(value, data.interface, self.bench.precision.merge_dtype))
        count = len(node.args)
        return values[:count], dict(zip(node.kwargs, values[count:], strict=True))

    def _source(self, node: RecipeNode) -> tuple[RecipeNode | None, str]:
        """The value that a node gives to every key."""
        for key in self.facts.available[node]:
            return self.facts.chosen[node](key) or (None, "")
        return None, ""

    def _result(self, node: MergeRecipeNode, arguments: tuple[list[Any], dict[str, Any]] | None, key: str) -> Any:
        """What a method that runs while planning makes of a key; the key itself where that is not known here."""
        call = self.bench.instance(node)
        if arguments is None or call is None:
            return key
        args, kwargs = arguments
        try:
            return _value_token(call(*args, **kwargs, **context(method_of(node), key, None, self.target.configs[node])))
        except StateDictKeyError:
            return key


def _check_numbers(nodes: Iterable[RecipeNode]) -> None:
    for node in nodes:
        for key, value in node.value_dict.items() if isinstance(node, LiteralRecipeNode) else ():
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise RecipeTypeError(
                    f"{node.label()}: the number at key {key!r} is too long to compute with: "
                    f"got {value.bit_length()} bits, expected at most {_MOST_BITS}"
                )


def _differs_by_key(node: RecipeNode, facts: KeyFacts) -> TypeGuard[MergeRecipeNode]:
    """Whether a method runs while planning and is told the key, so that its results may differ between keys."""
    if not isinstance(node, MergeRecipeNode) or node in facts.chosen or node in facts.realized:
        return False
    method = method_of(node)
    return method.tiling == "shape" and method.declaration.accepts_context


def _is_singleton(target: Target, node: RecipeNode) -> bool:
    return isinstance(node, LiteralRecipeNode) and len(target.configs[node].keys()) == 1


def _value_token(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, RecipeNode):
        return value.fingerprint
    return (type(value), repr(value))


def _groups(
    bench: Workbench, keys: Sequence[str], wanted: Mapping[str, Sequence[int]], memoize: bool
) -> Iterator[list[str]]:
    """Output keys that share a call: one that makes several keys at once, or a result worth keeping."""
    classes: Classes[None] = Classes()
    variable = {key: classes.new() for key in keys}
    maker: dict[object, str] = {}
    for key in keys:
        for target in wanted[key]:
            if key in bench.targets[target].facts.carried:
                continue
            realized = bench.targets[target].facts.realized
            for node, at in _calls_below(bench, target, key):
                relation = realized.get(node, {}).get(at)
                several = relation is not None and len(relation.outputs) > 1
                method = method_of(node)
                if several or (memoize and method.reuse_outputs and method.tiling == "whole"):
                    token = (target, node, relation.outputs if several and relation is not None else at)
                    classes.join(variable[maker.setdefault(token, key)], variable[key])
    groups: dict[int, list[str]] = {}
    for key in keys:
        groups.setdefault(classes.find(variable[key]), []).append(key)
    yield from groups.values()


def _calls_below(bench: Workbench, target: int, key: str) -> Iterator[tuple[MergeRecipeNode, str]]:
    builder = Builder(bench)
    builder.look_at(target)
    stack: list[Instance] = [(builder.target.root, key)]
    seen: set[Instance] = set()
    while stack:
        instance = stack.pop()
        if instance in seen:
            continue
        seen.add(instance)
        node, at = instance
        if isinstance(node, MergeRecipeNode) and node not in builder.target.facts.chosen:
            yield node, at
        stack.extend(builder.needs(instance))
