"""Recipes as `.mecha` text, version 0.1.0: writing them.

The text is a header and one instruction a line. An instruction refers to those above it by index, `&N`; equal
ones are written once. It is byte for byte what release 1.1.8 wrote wherever that could read it back.
"""

from __future__ import annotations

from sd_mecha.errors import RecipeTypeError
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.parser import VERSION
from sd_mecha.recipes.parser import deserialize_text as deserialize_text
from sd_mecha.recipes.provider import Named
from sd_mecha.recipes.tokens import format_name, format_scalar, quote
from sd_mecha.recipes.walk import toposort


def serialize_text(root: RecipeNode) -> str:
    """Write a recipe as text, in time linear in the number of distinct nodes.

    Args:
        root: the recipe.

    Raises:
        RecipeTypeError: it holds tensors, which text cannot: a model in memory, or a tensor in a literal.
    """
    if not isinstance(root, RecipeNode):
        raise RecipeTypeError(f"only recipe nodes can be written as text, got {type(root).__name__}")
    printer = _Printer()
    order = toposort(root)
    for node in order:
        try:
            printer.add(node)
        except _HoldsTensor as error:
            raise RecipeTypeError(_refusal(node, order, error)) from None
    return "\n".join([f"version {VERSION}", *printer.lines])


class _HoldsTensor(Exception):
    """A node cannot be written; the message says what it holds."""


class _Printer:
    """The instructions written so far, by node and by line."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self._index: dict[bytes, int] = {}

    def add(self, node: RecipeNode) -> None:
        """Write a node whose children are written."""
        if isinstance(node, ModelRecipeNode):
            if node.path is None:
                raise _HoldsTensor("save its tensors to a file and give the path of that to model()")
            line = f"model {quote(node.path)} {_declared(node)}"
        elif isinstance(node, MergeRecipeNode):
            parts = ["merge", quote(node.merge_method.identifier), *map(self._ref, node.args)]
            parts += [f"{format_name(name)}={self._ref(value)}" for name, value in node.kwargs.items()]
            line = " ".join(parts)
        elif isinstance(node, LiteralRecipeNode):
            line = "dict " + " ".join([self._item(key, value) for key, value in node.value_dict.items()])
            if node.model_config is not None or node.merge_space is not None:
                line = f"literal &{self._line(line)} {_declared(node)}"
        else:
            raise RecipeTypeError(f"a node of type {type(node).__name__} has no instruction in .mecha text")
        self._index[node.fingerprint] = self._line(line)

    def _line(self, line: str) -> int:
        return self.lines.setdefault(line, len(self.lines))

    def _ref(self, node: RecipeNode) -> str:
        return f"&{self._index[node.fingerprint]}"

    def _item(self, key: str, value: object) -> str:
        if isinstance(value, RecipeNode):
            return f"{format_name(key)}={self._ref(value)}"
        if value is None or isinstance(value, (bool, int, float, str)):
            return f"{format_name(key)}={format_scalar(value)}"
        raise _HoldsTensor(
            f"key {key!r} holds a tensor: use a number, or save it to a file and use model() of its path"
        )


def _declared(node: RecipeNode) -> str:
    return f"model_config={_name(node.model_config)} merge_space={_name(node.merge_space)}"


def _name(value: Named | None) -> str:
    return "null" if value is None else quote(value.identifier)


def _refusal(node: RecipeNode, order: list[RecipeNode], reason: Exception) -> str:
    user = next((n for n in order if any(c.fingerprint == node.fingerprint for c in n.children)), None)
    where = "" if user is None else f" (input of {user.label()})"
    return f"this recipe cannot be written as text, which holds no tensors: {node!r}{where}: {reason}"
