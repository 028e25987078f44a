"""Where recipes find what they only know by name.

A recipe names merge methods, model configs and merge spaces, but the registries that hold them live a floor
above. That floor installs a `Provider` here when it is imported; operators (`a + b`) and the `.mecha` reader
ask it at call time, so a recipe can be composed and read without this floor importing anything above it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sd_mecha.recipes.base import RecipeNode


class Named(Protocol):
    """A model config or a merge space, as far as a recipe cares."""

    @property
    def identifier(self) -> str: ...


class Method(Protocol):
    """A merge method, as far as a recipe cares: calling it wraps and binds the arguments into a node."""

    @property
    def identifier(self) -> str: ...

    @property
    def signature(self) -> inspect.Signature: ...

    def create_cache(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> RecipeNode: ...


class Provider(Protocol):
    """Resolves names; each lookup raises `UnknownNameError` for a name that is not registered."""

    def method(self, identifier: str) -> Method: ...

    def config(self, identifier: str) -> Named: ...

    def space(self, identifier: str) -> Named: ...

    def wrap(self, value: Any) -> RecipeNode:
        """Turn a Python value into the node that stands for it; a node is returned as it is."""
        ...


_installed: Provider | None = None


def install(provider: Provider | None) -> Provider | None:
    """Make `provider` the one that recipes ask, and return the one it replaces."""
    global _installed
    previous, _installed = _installed, provider
    return previous


def current() -> Provider:
    """Return the installed provider.

    Raises:
        RuntimeError: nothing is installed yet, because no module above this floor was imported.
    """
    if _installed is None:
        raise RuntimeError("no merge methods are loaded: import sd_mecha before composing or reading recipes")
    return _installed
