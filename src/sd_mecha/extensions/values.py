"""Python values where a recipe expects a node.

A scalar becomes a literal of config `singleton-mecha`, broadcast by `convert_singleton` to whatever keys it meets; a
dict becomes a literal with one value per key; a `pathlib.Path` and a `torch.nn.Module` become models; a str stays a
str.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from sd_mecha.errors import RecipeError, RecipeTypeError
from sd_mecha.extensions import merge_spaces, model_configs
from sd_mecha.extensions.parameters import StateDict, type_name
from sd_mecha.recipes import provider
from sd_mecha.recipes.nodes import LiteralRecipeNode, ModelRecipeNode, RecipeNode

Scalar = None | bool | int | float | str | torch.Tensor
RecipeNodeOrValue = RecipeNode | Scalar | Mapping[str, Any] | pathlib.Path | torch.nn.Module


def value_to_node(node_or_value: RecipeNodeOrValue, expected_type: Any = None) -> RecipeNode:
    """Wrap a Python value as a recipe node; a node is returned as it is.

    Args:
        node_or_value: a node, None, bool, int, float, str, tensor, dict of one kind of these, `pathlib.Path` or
            `torch.nn.Module`.
        expected_type: the type that the parameter declares (None: anything).

    Raises:
        RecipeTypeError: the value has no such meaning, or not the expected type.
    """
    value = node_or_value
    if isinstance(value, RecipeNode):
        return value
    if isinstance(value, pathlib.Path):
        return ModelRecipeNode(str(value), None, merge_spaces.resolve("weight"))
    if isinstance(value, torch.nn.Module):
        return ModelRecipeNode(value, None, merge_spaces.resolve("weight"))
    if isinstance(value, Mapping):
        _check_mapping(value, expected_type)
        return LiteralRecipeNode(dict(value))
    _check_scalar(value, expected_type)
    literal = LiteralRecipeNode({"key": value}, model_configs.resolve("singleton-mecha"))
    return provider.current().method("convert_singleton")(literal)


def _value_type(expected: Any) -> Any:
    import typing

    return typing.get_args(expected)[0] if typing.get_origin(expected) is StateDict else expected


def _check_scalar(value: Any, expected: Any) -> None:
    if not isinstance(value, None | bool | int | float | str | torch.Tensor):
        raise RecipeTypeError(
            f"a {type(value).__name__} cannot stand in a recipe; "
            "expected a recipe node, None, bool, int, float, str, tensor, dict, pathlib.Path or torch.nn.Module"
        )
    wanted = _value_type(expected)
    if value is None or wanted is None:
        return
    if isinstance(value, str) and wanted in (torch.Tensor, int, float, bool):
        raise RecipeTypeError(
            f"the str {value!r} cannot be cast to {type_name(wanted)}; "
            "for a model file write sd_mecha.model(path) or pathlib.Path(path)"
        )
    if not isinstance(value, str) and wanted is str:
        raise RecipeTypeError(f"a {type(value).__name__} cannot be cast to str")


def _check_mapping(value: Mapping[Any, Any], expected: Any) -> None:
    if bad := [k for k in value if not isinstance(k, str)]:
        raise RecipeTypeError(f"keys of a dict in a recipe must be str, not {type(bad[0]).__name__} ({bad[0]!r})")
    nodes = [v for v in value.values() if isinstance(v, RecipeNode)]
    if nodes and len(nodes) != len(value):
        raise RecipeTypeError("a dict in a recipe mixes recipe nodes with plain values")
    for attribute in ("model_config", "merge_space"):
        found = {getattr(n, attribute) for n in nodes} - {None}
        if len(found) > 1:
            names = sorted(f.identifier for f in found)
            raise DictOfNodesError(f"the nodes of a dict differ in {attribute}: {', '.join(names)}")
    kinds = {_kind(v) for v in value.values()} if not nodes else set()
    if len(kinds) > 1:
        raise RecipeTypeError(f"a dict in a recipe mixes {', '.join(sorted(kinds))}; use one kind of value")
    for v in value.values():
        if not isinstance(v, RecipeNode):
            _check_scalar(v, expected)


class DictOfNodesError(RecipeError, RuntimeError):
    """Recipe nodes that differ in config or merge space stand in one dict."""


def _kind(value: Any) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


class _Provider:
    """What `recipes` needs to know of the sockets above it."""

    def method(self, identifier: str) -> Any:
        from sd_mecha.extensions import merge_methods

        return merge_methods.resolve(identifier)

    def config(self, identifier: str) -> Any:
        return model_configs.resolve(identifier)

    def space(self, identifier: str) -> Any:
        return merge_spaces.resolve(identifier)

    def wrap(self, value: Any) -> RecipeNode:
        return value_to_node(value)


provider.install(_Provider())
