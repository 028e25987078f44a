"""The two ways to begin a recipe: a model, and a literal made explicit so that operators work on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sd_mecha.errors import RecipeTypeError
from sd_mecha.recipes import provider
from sd_mecha.recipes.nodes import LiteralRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.provider import Named

if TYPE_CHECKING:
    import torch

SINGLETON_CONFIG = "singleton-mecha"
"""Config of a literal that holds one value, under `SINGLETON_KEY`, for every key of whatever it meets."""

SINGLETON_KEY = "key"
SINGLETON_CONVERSION = "convert_singleton"


def model(
    state_dict: str | os.PathLike[str] | Mapping[str, Any] | torch.nn.Module,
    config: str | Named | None = None,
    merge_space: str | Named | None = "weight",
) -> ModelRecipeNode:
    """Make a node of a model.

    Args:
        state_dict: path of a file, which is opened when merging, a mapping of keys to tensors, or a
            `torch.nn.Module`, of which the parameters and buffers are read that it has when merging.
        config: name of the model config, or the config; None lets inference choose.
        merge_space: name of the merge space, or the space; None lets inference choose.

    Raises:
        RecipeTypeError: the model is none of these.
        UnknownNameError: no config or merge space of that name is registered.

    >>> import torch, sd_mecha
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> sd_mecha.merge(sd_mecha.model(net) + sd_mecha.model(net, merge_space="delta"))["weight"]
    tensor([[2.]], dtype=torch.float16)
    """
    return ModelRecipeNode(state_dict, config, merge_space)


def literal(value: Any, config: str | Named | None = None, merge_space: str | Named | None = None) -> RecipeNode:
    """Make a node of a value.

    Args:
        value: a dict of keys to values, one value for all keys, or a node, which is returned as it is.
        config: name of the config that the keys belong to, or the config; None lets inference choose.
        merge_space: name of the merge space, or the space; None lets inference choose.

    Raises:
        RecipeTypeError: the value, or one in the dict, is of a type that recipes do not hold.
        UnknownNameError: no config or merge space of that name is registered.
    """
    if isinstance(value, RecipeNode):
        if config is not None or merge_space is not None:
            raise RecipeTypeError(f"{value!r} is a node already: it takes no other config or merge space")
        return value
    if isinstance(value, Mapping):
        return LiteralRecipeNode(value, config, merge_space)
    single = LiteralRecipeNode({SINGLETON_KEY: value}, SINGLETON_CONFIG, merge_space)
    if config is not None and (config if isinstance(config, str) else config.identifier) == SINGLETON_CONFIG:
        return single
    return provider.current().method(SINGLETON_CONVERSION)(single)
