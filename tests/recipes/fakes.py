"""A provider of a few merge methods, so that recipes are tested without anything that stands above them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sd_mecha.errors import RecipeTypeError, UnknownNameError
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, RecipeNode


@dataclass(frozen=True)
class Name:
    identifier: str


@dataclass(eq=False)
class FakeMethod:
    identifier: str
    fn: Callable[..., Any]
    wrap: Callable[[Any], RecipeNode]
    signature: inspect.Signature = field(init=False)

    def __post_init__(self) -> None:
        self.signature = inspect.signature(self.fn)

    def create_cache(self) -> Any:
        return {} if self.identifier == "rotate" else None

    def __call__(self, *args: Any, **kwargs: Any) -> RecipeNode:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = {name: self.wrap(value) for name, value in bound.kwargs.items()}
        return MergeRecipeNode.of(self, tuple([self.wrap(value) for value in bound.args]), named)


def _declarations() -> dict[str, Callable[..., Any]]:
    return {
        "add_difference": lambda a, b, alpha=1.0: None,
        "subtract": lambda a, b: None,
        "scale": lambda a, alpha=1.0: None,
        "fallback": lambda a, b: None,
        "cast": lambda a, device=None, dtype=None: None,
        "weighted_sum": lambda a, b, alpha=0.5: None,
        "rotate": lambda a, b: None,
        "convert_singleton": lambda a: None,
        "n_average": lambda *models: None,
        "ties_sum": lambda *models, k=1.0, vote_sgn=False: None,
        "a \"quoted\" 'method' = \\ \n": lambda *models, k=1.0: None,
    }


class FakeProvider:
    """Knows the methods above, and every config and space whose name does not begin with `nope`.

    Args:
        any_method: make up a method of any inputs for every other name.
    """

    def __init__(self, any_method: bool = False) -> None:
        self.methods = {name: FakeMethod(name, fn, self.wrap) for name, fn in _declarations().items()}
        self.any_method = any_method

    def method(self, identifier: str) -> FakeMethod:
        if identifier not in self.methods:
            if not self.any_method:
                raise UnknownNameError(f"unknown merge method {identifier!r}")
            self.methods[identifier] = FakeMethod(identifier, lambda *args, **kwargs: None, self.wrap)
        return self.methods[identifier]

    def config(self, identifier: str) -> Name:
        return self._name("model config", identifier)

    def space(self, identifier: str) -> Name:
        return self._name("merge space", identifier)

    def wrap(self, value: Any) -> RecipeNode:
        if isinstance(value, RecipeNode):
            return value
        if isinstance(value, dict):
            return LiteralRecipeNode(value)
        if isinstance(value, list):
            raise RecipeTypeError("a list cannot stand in a recipe")
        return self.method("convert_singleton")(LiteralRecipeNode({"key": value}, Name("singleton-mecha")))

    def _name(self, kind: str, identifier: str) -> Name:
        if identifier.startswith("nope"):
            raise UnknownNameError(f"unknown {kind} {identifier!r}")
        return Name(identifier)
