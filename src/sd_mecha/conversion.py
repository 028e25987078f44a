"""Converting a recipe to another model config, by the shortest chain of registered conversions."""

from __future__ import annotations

from collections.abc import Sequence

from sd_mecha.errors import ConfigError
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.adapters import looks_like_adapter
from sd_mecha.extensions.merge_methods import (
    MergeMethod,
    RecipeNodeOrValue,
    get_conversions_from,
    resolve,
    value_to_node,
)
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.graph import open_graph
from sd_mecha.recipes.nodes import LiteralRecipeNode, ModelRecipeNode, RecipeNode


def convert(recipe: RecipeNodeOrValue, config: str | ModelConfig | RecipeNodeOrValue) -> RecipeNode:
    """Convert a recipe to a model config.

    Args:
        recipe: what to convert; its models are opened to see what they are.
        config: the config, its identifier, or a recipe whose config is wanted.

    Returns:
        The recipe with conversions around it; the recipe itself where it may have that config already. An adapter
        file becomes the delta that it makes of a model of the config, by `adapter_delta`, where no conversion is for
        all of its keys; kinds that look at the weights, as DoRA does, need a recipe as `config`.

    Raises:
        ConfigError: no chain of conversions leads there; the message names both ends.
    """
    node = value_to_node(recipe)
    sources = _candidates(node)
    if isinstance(config, str | ModelConfig):
        targets = [model_configs.resolve(config)]
    else:
        targets = _candidates(value_to_node(config))
    wanted = {c.identifier for c in targets}
    chain = _shortest([c.identifier for c in sources], wanted)
    if (chain is None or len(chain) > 0) and _is_adapter(node, sources if chain else ()):
        base = LiteralRecipeNode({}, targets[0]) if isinstance(config, str | ModelConfig) else value_to_node(config)
        return resolve("adapter_delta")(node, base)
    if chain is None:
        ends = [", ".join(c.identifier for c in side) or "an unknown config" for side in (sources, targets)]
        raise ConfigError(f"no conversion leads from {ends[0]} to {ends[1]}")
    for method in chain:
        node = method(node)
    return node


def _candidates(node: RecipeNode) -> list[ModelConfig]:
    with open_graph(node, solve_merge_space=False) as graph:
        return graph.root_candidates().model_config


def _is_adapter(node: RecipeNode, sources: Sequence[ModelConfig]) -> bool:
    """Whether a node is a plain file of adapters with keys that none of the configs knows."""
    if not isinstance(node, ModelRecipeNode) or node.model_config is not None:
        return False
    with open_graph(node, solve_model_config=False, solve_merge_space=False) as graph:
        keys = list(graph.models[node].entries)
    if any(all(config.find(key) is not None for key in keys) for config in sources):
        return False
    return looks_like_adapter(keys)


def _shortest(sources: Sequence[str], targets: set[str]) -> list[MergeMethod] | None:
    """Breadth first from all sources at once; the first source wins among chains of equal length.

    A chain that goes from a model to a part of it stays within the part, and the other way round. Otherwise any two
    models would be joined by an autoencoder that both may have, and the rest would be lost on the way.
    """
    chains: dict[tuple[str, int], list[MergeMethod]] = {(source, 0): [] for source in sources}
    queue = list(chains)
    for here in queue:
        identifier, way = here
        if identifier in targets:
            return chains[here]
        for there, method in get_conversions_from(identifier):
            step = _direction(identifier, there) if way or there not in targets else 0
            state = there, step or way
            if step * way >= 0 and state not in chains:
                chains[state] = [*chains[here], method]
                queue.append(state)
    return None


def _direction(source: str, target: str) -> int:
    """-1 from a model to a part of it, 1 from a part to the model, 0 where both have the same components."""
    try:
        start, end = (model_configs.resolve(name) for name in (source, target))
    except KeyError:
        return 0  # a config that is not registered
    complete, reversible = (_needed(a) <= b.components().keys() for a, b in ((start, end), (end, start)))
    return int(complete) - int(reversible)


def _needed(config: ModelConfig) -> set[str]:
    """The components that a model of the config must have any key of."""
    parts = config.components().items()
    return {name for name, part in parts if not all(metadata.optional for metadata in part.keys().values())}
