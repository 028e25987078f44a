"""Merge spaces: which kind of quantity (weight, delta, param, ...) every node of a recipe holds.

Each node gets a variable; each use of a method joins the variables that share one of its merge-space symbols and
constrains the others. A class whose constraints have nothing in common is a contradiction; all are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sd_mecha.errors import MergeSpaceError
from sd_mecha.extensions import merge_spaces
from sd_mecha.extensions.merge_spaces import MergeSpace, MergeSpaceSymbol
from sd_mecha.extensions.method import method_of
from sd_mecha.planning.trail import named_children, path_to
from sd_mecha.planning.unify import Classes
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort


@dataclass(frozen=True)
class SpaceConstraint:
    allowed: frozenset[MergeSpace]
    node: RecipeNode
    reason: str


@dataclass
class SpaceFacts:
    """The candidates of each node: more than one only where nothing in the recipe decides."""

    classes: Classes[SpaceConstraint]
    variable: dict[RecipeNode, int]
    _found: dict[int, frozenset[MergeSpace]] = field(default_factory=dict)  # by class

    def candidates(self, node: RecipeNode) -> frozenset[MergeSpace]:
        members = self.classes.find(self.variable[node])
        if members not in self._found:
            everything = frozenset(merge_spaces.get_all())
            self._found[members] = everything.intersection(*(c.allowed for c in self.classes.constraints(members)))
        return self._found[members]


def solve_spaces(root: RecipeNode, wanted: Iterable[MergeSpace] | None = None) -> SpaceFacts:
    """Unify the merge spaces below `root`; `wanted` limits the root's.

    Raises:
        MergeSpaceError: some constraints have no space in common; each contradiction names both.
    """
    classes: Classes[SpaceConstraint] = Classes()
    variable: dict[RecipeNode, int] = {}
    everything = frozenset(merge_spaces.get_all())
    for node in toposort(root):
        var = variable[node] = classes.new()
        if node.merge_space is not None:
            classes.constrain(
                var,
                SpaceConstraint(frozenset({merge_spaces.resolve(node.merge_space.identifier)}), node, "is declared"),
            )
        if isinstance(node, MergeRecipeNode):
            _constrain_call(node, var, variable, classes, everything)
        elif isinstance(node, LiteralRecipeNode):
            for _, child in named_children(node):
                classes.join(var, variable[child])
    if wanted is not None:
        classes.constrain(variable[root], SpaceConstraint(frozenset(wanted), root, "is asked of the result"))
    _report(root, classes, bool(wanted))
    return SpaceFacts(classes, variable)


def _constrain_call(
    node: MergeRecipeNode,
    var: int,
    variable: dict[RecipeNode, int],
    classes: Classes[SpaceConstraint],
    everything: frozenset[MergeSpace],
) -> None:
    method = method_of(node)
    symbols: dict[MergeSpaceSymbol, int] = {}

    def apply(space: object, target: int, where: RecipeNode, reason: str) -> None:
        if isinstance(space, MergeSpaceSymbol):
            if space in symbols:
                classes.join(symbols[space], target)
            else:
                symbols[space] = target
                if (allowed := space.merge_spaces) != everything:
                    classes.constrain(target, SpaceConstraint(allowed, where, reason))
        elif isinstance(space, frozenset):
            classes.constrain(target, SpaceConstraint(space, where, reason))

    apply(method.declaration.result.merge_space, var, node, f"is what {method.identifier} returns")
    spaces = method.get_input_merge_spaces()
    positional = spaces.args_varargs(len(node.args))
    bound: list[tuple[object, RecipeNode]] = list(zip(positional, node.args, strict=True))
    bound += [(spaces.kwargs[name], child) for name, child in node.kwargs.items()]
    for (space, child), (name, _) in zip(bound, named_children(node), strict=True):
        apply(space, variable[child], child, f"is what {method.identifier} takes as {name}")


def _report(root: RecipeNode, classes: Classes[SpaceConstraint], strict: bool) -> None:
    problems = []
    for var in classes.roots():
        constraints = classes.constraints(var)
        allowed: frozenset[MergeSpace] | None = None
        for i, c in enumerate(constraints):
            narrowed = c.allowed if allowed is None else allowed & c.allowed
            if not narrowed:
                other = next((o for o in constraints[:i] if not (o.allowed & c.allowed)), constraints[i - 1])
                problems.append(_contradiction(root, other, c))
                break
            allowed = narrowed
    if problems:
        hint = ""
        if strict and any("asked of the result" in p for p in problems):
            hint = "pass strict_merge_space=None to accept a result in another merge space"
        raise MergeSpaceError([*problems, hint] if hint else problems)


def _contradiction(root: RecipeNode, one: SpaceConstraint, other: SpaceConstraint) -> str:
    def line(c: SpaceConstraint) -> str:
        return f"{_names(c.allowed)} {c.reason} (at {path_to(root, c.node)})"

    return f"merge spaces do not agree: {line(one)}, but {line(other)}"


def _names(spaces: Iterable[MergeSpace]) -> str:
    return " or ".join(sorted(s.identifier for s in spaces))


def prefer(candidates: Iterable[MergeSpace], preference: Sequence[MergeSpace] | None = None) -> MergeSpace | None:
    """The preferred candidate: weight, delta, param, then user-defined ones in order of registration."""
    order = list(preference) if preference is not None else merge_spaces.get_all()
    present = set(candidates)
    return next((s for s in order if s in present), None)
