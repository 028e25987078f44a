"""Builds the recipes of the golden cases.

A case describes its recipe as a tree: models and tensors are files beside the manifest, everything else is a
method, an operator, a literal, a conversion or a plain value. `recipe` turns a tree into nodes; `names` tells
what a tree needs, so that cases of methods that do not exist yet can be left for later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import sd_mecha
from sd_mecha.extensions import merge_methods

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "|": operator.or_,
}


def recipe(tree: Any, root: Path) -> Any:
    """The recipe (or plain value) that a tree describes.

    Args:
        tree: the `expression` of a golden case.
        root: the folder that file names are relative to.
    """
    if not isinstance(tree, dict):
        return tree
    for kind, build in BUILDERS.items():
        if kind in tree:
            return build(tree, root)
    raise ValueError(f"no such expression: {tree}")


def names(tree: Any) -> Iterator[str]:
    """Every function of the public interface and every registered method that a tree mentions."""
    if isinstance(tree, list):
        for part in tree:
            yield from names(part)
    elif isinstance(tree, dict):
        if "method" in tree:
            yield tree["method"] if tree.get("via", "api") == "api" else f"registry:{tree['method']}"
        if "convert" in tree:
            yield "convert"
        for part in tree.values():
            yield from names(part)


def exists(name: str) -> bool:
    """Whether this version has the function or method of that name."""
    registered = name.removeprefix("registry:")
    if registered == name:
        return hasattr(sd_mecha, name)
    return any(method.identifier == registered for method in merge_methods.get_all())


def _model(tree: dict[str, Any], root: Path) -> Any:
    options = _given(tree, "config", "merge_space")
    path = root / tree["model"]
    return sd_mecha.model(load_file(path) if tree.get("in_memory") else path, **options)


def _method(tree: dict[str, Any], root: Path) -> Any:
    name, public = tree["method"], tree.get("via", "api") == "api"
    method = getattr(sd_mecha, name) if public else merge_methods.resolve(name)
    args = [recipe(part, root) for part in tree.get("args", [])]
    return method(*args, **{key: recipe(part, root) for key, part in tree.get("kwargs", {}).items()})


def _operator(tree: dict[str, Any], root: Path) -> Any:
    left, right = (recipe(part, root) for part in tree["args"])
    return OPERATORS[tree["op"]](left, right)


def _literal(tree: dict[str, Any], root: Path) -> Any:
    values = {key: recipe(part, root) for key, part in tree["dict"].items()}
    return sd_mecha.literal(values, **_given(tree, "config", "merge_space"))


def _tensor(tree: dict[str, Any], root: Path) -> torch.Tensor:
    return load_file(root / tree["tensor"])[tree["key"]]


def _cast(tree: dict[str, Any], root: Path) -> Any:
    options = dict(tree["to"])
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    return recipe(tree["args"][0], root).to(**options)


def _conversion(tree: dict[str, Any], root: Path) -> Any:
    return sd_mecha.convert(recipe(tree["args"][0], root), tree["convert"])


def _given(tree: dict[str, Any], *options: str) -> dict[str, Any]:
    return {name: tree[name] for name in options if tree.get(name)}


BUILDERS: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "model": _model,
    "method": _method,
    "op": _operator,
    "dict": _literal,
    "tensor": _tensor,
    "to": _cast,
    "convert": _conversion,
}
