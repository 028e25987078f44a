"""Interfaces: each call of an interface method becomes a call of the first implementation that fits its inputs."""

from __future__ import annotations

from collections.abc import Sequence

from sd_mecha.extensions import merge_spaces
from sd_mecha.extensions.merge_spaces import MergeSpace, MergeSpaceSymbol
from sd_mecha.extensions.method import CandidateDispatchError, MergeMethod, MergeMethodInterface, method_of
from sd_mecha.planning.configs import collect
from sd_mecha.planning.opening import OpenModels
from sd_mecha.planning.spaces import solve_spaces
from sd_mecha.planning.trail import path_to
from sd_mecha.recipes.nodes import MergeRecipeNode, RecipeNode
from sd_mecha.recipes.walk import rewrite, toposort


def choose_implementations(root: RecipeNode, models: OpenModels) -> RecipeNode:
    """`root` with every interface call replaced; models keep their readers, since nodes compare by structure.

    Raises:
        CandidateDispatchError: no implementation takes inputs of these configs.
    """
    if not any(isinstance(n, MergeRecipeNode) and _interface(n) is not None for n in toposort(root)):
        return root

    def choose(node: RecipeNode) -> RecipeNode:
        if not isinstance(node, MergeRecipeNode) or _interface(node) is None:
            return node
        method = _choose(root, node, models)
        return MergeRecipeNode.of(method, node.args, node.kwargs, node.model_config, node.merge_space)

    return rewrite(root, choose)


def _interface(node: MergeRecipeNode) -> MergeMethodInterface | None:
    return method_of(node).interface


def _choose(root: RecipeNode, node: MergeRecipeNode, models: OpenModels) -> MergeMethod:
    method = method_of(node)
    assert method.interface is not None
    configs = [collect(child, models) for child in node.args]
    spaces = [solve_spaces(child).candidates(child) for child in node.args]
    for candidate, _ in method.interface.candidates:
        declared = candidate.get_input_configs().args_varargs(len(node.args))
        fits = all(
            config is None or facts.allows(child, config)
            for config, facts, child in zip(declared, configs, node.args, strict=True)
        )
        if fits and _spaces_fit(candidate, spaces):
            return candidate
    known = ", ".join(c.identifier for c, _ in method.interface.candidates) or "none"
    shown = []
    names = method.declaration.names.args_varargs(len(node.args))
    for name, facts, child, space in zip(names, configs, node.args, spaces, strict=True):
        found = ", ".join(c.identifier for c in facts.candidates(child)[:3]) or "no known config"
        shown.append(f"{name}: {found}, {' or '.join(merge_spaces.get_identifiers(space))}")
    raise CandidateDispatchError(
        method.identifier,
        f"no implementation fits ({'; '.join(shown)}) at {path_to(root, node)}; implementations: {known}",
    )


def _spaces_fit(candidate: MergeMethod, found: Sequence[frozenset[MergeSpace]]) -> bool:
    """Whether inputs that may be in these merge spaces are ones that a method takes."""
    shared: dict[object, frozenset[MergeSpace]] = {}
    for declared, have in zip(candidate.get_input_merge_spaces().args_varargs(len(found)), found, strict=True):
        allowed = shared.get(declared, merge_spaces.resolve_set(declared)) & have
        if isinstance(declared, MergeSpaceSymbol):
            shared[declared] = allowed
        if not allowed:
            return False
    return True
