"""Writing the answers of planning into a recipe: configs and merge spaces, filled in where they were left open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sd_mecha.extensions.merge_spaces import MergeSpace
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.planning.spaces import SpaceFacts, prefer
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort


def fill_in(
    root: RecipeNode,
    configs: Mapping[RecipeNode, ModelConfig] | None,
    spaces: SpaceFacts | None,
    preference: Sequence[MergeSpace] | None = None,
) -> RecipeNode:
    """`root` with a config and a merge space at every node; None leaves that fact as it is."""
    new: dict[RecipeNode, RecipeNode] = {}
    for node in toposort(root):
        config = node.model_config if configs is None else configs[node]
        space = node.merge_space
        if spaces is not None:
            space = prefer(spaces.candidates(node), preference)
        if isinstance(node, ModelRecipeNode):
            source = node.path if node.path is not None else node.memory
            assert source is not None
            new[node] = ModelRecipeNode(source, config, space)
        elif isinstance(node, LiteralRecipeNode):
            values = {k: new[v] if isinstance(v, RecipeNode) else v for k, v in node.value_dict.items()}
            new[node] = LiteralRecipeNode(values, config, space)
        else:
            assert isinstance(node, MergeRecipeNode)
            args = tuple(new[child] for child in node.args)
            kwargs = {name: new[child] for name, child in node.kwargs.items()}
            new[node] = MergeRecipeNode.of(node.merge_method, args, kwargs, config, space)
    return new[root]
