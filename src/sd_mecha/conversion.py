"""Converting a recipe to another model config, by the shortest chain of registered conversions."""

from __future__ import annotations

from collections.abc import Sequence

from sd_mecha.errors import ConfigError
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.merge_methods import (
    MergeMethod,
    RecipeNodeOrValue,
    get_converter_paths,
    value_to_node,
)
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.graph import open_graph
from sd_mecha.recipes.nodes import RecipeNode


def convert(recipe: RecipeNodeOrValue, config: str | ModelConfig | RecipeNodeOrValue) -> RecipeNode:
    """Convert a recipe to a model config.

    Args:
        recipe: what to convert; its models are opened to see what they are.
        config: the config, its identifier, or a recipe whose config is wanted.

    Returns:
        The recipe with conversions around it; the recipe itself where it may have that config already.

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
    if chain is None:
        ends = [", ".join(c.identifier for c in side) or "an unknown config" for side in (sources, targets)]
        raise ConfigError(f"no conversion leads from {ends[0]} to {ends[1]}")
    for method in chain:
        node = method(node)
    return node


def _candidates(node: RecipeNode) -> list[ModelConfig]:
    with open_graph(node, solve_merge_space=False) as graph:
        return graph.root_candidates().model_config


def _shortest(sources: Sequence[str], targets: set[str]) -> list[MergeMethod] | None:
    """Breadth first from all sources at once; the first source wins among chains of equal length."""
    paths = get_converter_paths()
    chains: dict[str, list[MergeMethod]] = {s: [] for s in sources}
    queue = list(chains)
    for here in queue:
        if here in targets:
            return chains[here]
        for there, method in paths.get(here, []):
            if there not in chains:
                chains[there] = [*chains[here], method]
                queue.append(there)
    return None
