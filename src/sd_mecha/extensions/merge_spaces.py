"""Merge spaces: what kind of number a tensor holds.

`weight` is a model as it is, `delta` a difference of two models, `param` a number that steers a merge. A user
may register more. A parameter of a merge method names a space, a set of spaces, or a `MergeSpaceSymbol`
shared with other parameters and the return: the same space, whichever it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sd_mecha.extensions.registry import Registry


@dataclass(frozen=True)
class MergeSpace:
    """A kind of number, told apart by its identifier."""

    identifier: str

    def __repr__(self) -> str:
        return f"MergeSpace({self.identifier!r})"


class MergeSpaceSymbol:
    """A variable for a merge space: everything annotated with the same symbol is in the same space.

    Args:
        merge_spaces: the spaces it may stand for, or their identifiers. Without any it may stand for every
            registered space, those registered later included.

    Two symbols are never equal, even if they allow the same spaces.
    """

    __slots__ = ("__weakref__", "_allowed")

    def __init__(self, *merge_spaces: MergeSpace | str) -> None:
        self._allowed = merge_spaces

    @property
    def merge_spaces(self) -> frozenset[MergeSpace]:
        """The spaces that the symbol may stand for now."""
        if not self._allowed:
            return frozenset(get_all())
        return frozenset(map(resolve, self._allowed))

    def __repr__(self) -> str:
        names = (space if isinstance(space, str) else space.identifier for space in self._allowed)
        return f"MergeSpaceSymbol({', '.join(map(repr, names))})"


AnyMergeSpace = MergeSpace | MergeSpaceSymbol | str | Iterable[MergeSpace | str]
"""What an annotation may say about the merge space of a parameter."""

_registry: Registry[MergeSpace] = Registry("merge space")


def register_merge_space(identifier: str) -> MergeSpace:
    """Add a merge space and return it.

    Raises:
        DuplicateNameError: the identifier is taken.
    """
    merge_space = MergeSpace(identifier)
    _registry.register(identifier, merge_space)
    return merge_space


def resolve(identifier: str | MergeSpace) -> MergeSpace:
    """Return the merge space of that name; a merge space is returned as it is.

    Raises:
        UnknownNameError: no merge space has that name.
    """
    return identifier if isinstance(identifier, MergeSpace) else _registry.resolve(identifier)


def get_all() -> list[MergeSpace]:
    """Return every registered merge space: `weight`, `delta`, `param`, then those of users."""
    return _registry.get_all()


def resolve_set(merge_space: AnyMergeSpace) -> frozenset[MergeSpace]:
    """Return the spaces that a space, a name, a symbol or a collection of spaces allows.

    Raises:
        TypeError: it is none of these.
        UnknownNameError: a name in it is not registered.
    """
    if isinstance(merge_space, (MergeSpace, str)):
        return frozenset({resolve(merge_space)})
    if isinstance(merge_space, MergeSpaceSymbol):
        return merge_space.merge_spaces
    if isinstance(merge_space, Iterable):
        return frozenset(map(resolve, merge_space))
    raise TypeError(f"expected a merge space, its name, a symbol or a set of spaces, got {merge_space!r}")


def get_identifiers(merge_space: AnyMergeSpace) -> list[str]:
    """Return the names of the spaces allowed, in order of registration.

    Raises:
        TypeError, UnknownNameError: as `resolve_set`.
    """
    names = {space.identifier for space in resolve_set(merge_space)}
    known = [name for name in _registry if name in names]
    return known + sorted(names.difference(known))


WEIGHT = register_merge_space("weight")
DELTA = register_merge_space("delta")
PARAM = register_merge_space("param")
