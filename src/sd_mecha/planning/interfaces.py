"""Interfaces: each call of an interface method becomes a call of the first implementation that fits its inputs."""

from __future__ import annotations

from sd_mecha.extensions.method import CandidateDispatchError, MergeMethod, MergeMethodInterface, method_of
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.planning.configs import collect
from sd_mecha.planning.opening import OpenModels
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
    found = [collect(child, models).candidates(child) for child in node.args]
    for candidate, _ in method.interface.candidates:
        configs = candidate.get_input_configs().args_varargs(len(node.args))
        if all(_fits(config, have) for config, have in zip(configs, found, strict=True)):
            return candidate
    known = ", ".join(c.identifier for c, _ in method.interface.candidates) or "none"
    shown = "; ".join(
        f"{name}: {', '.join(c.identifier for c in have[:3]) or 'no known config'}"
        for name, have in zip(method.declaration.names.args_varargs(len(node.args)), found, strict=True)
    )
    raise CandidateDispatchError(
        method.identifier,
        f"no implementation fits ({shown}) at {path_to(root, node)}; implementations: {known}",
    )


def _fits(config: ModelConfig | None, have: list[ModelConfig]) -> bool:
    return config is None or not have or any(c.identifier == config.identifier for c in have)
