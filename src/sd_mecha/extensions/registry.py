"""One registry for every kind of plug.

A registry maps identifiers to values of one kind: merge methods, configs, merge spaces, formats. Plugs
register themselves when their module is imported, and nothing is imported before it is needed: a name that is
not known yet, or the wish to see all names, loads the built-in plugs and then the entry points of group
`sd_mecha` of every installed distribution, once per process.

Locking: the built-ins are guarded by Python's own import lock, which lets the importing thread through and
makes others wait. Entry points run under one re-entrant lock, so a plug may look up names while it is being
loaded. They are put off while the package itself is still being imported, because a plug starts by importing
the finished package.

This module imports neither torch nor any plug.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Generic, TypeVar

from sd_mecha.errors import DuplicateNameError, UnknownNameError

T = TypeVar("T")

ENTRY_POINT_GROUP = "sd_mecha"
BUILTIN_PACKAGE = "sd_mecha.builtin"

_logger = logging.getLogger("sd_mecha")
_lock = threading.RLock()
_loading = False
_loaded = False


def load_plugins() -> None:
    """Import the built-in plugs, then those of installed distributions; does nothing once that is done.

    An entry point names a module, or a callable that is called without arguments. One that fails is logged by
    the name of its distribution and left out; the others still load.
    """
    global _loading, _loaded
    if _loaded:
        return
    importlib.import_module(BUILTIN_PACKAGE)
    if _being_imported("sd_mecha") or _being_imported(BUILTIN_PACKAGE):
        return
    with _lock:
        if _loaded or _loading:
            return
        _loading = True
        try:
            for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                _load_entry_point(entry_point)
            _loaded = True
        finally:
            _loading = False


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` where a known name is near, and an empty text where none is."""
    folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.7)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


class Registry(Generic[T]):
    """Values of one kind by identifier, in order of registration; safe to use from several threads."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.version = 0
        """Changes whenever a value comes or goes, so that derived tables know when they are stale."""
        self._values: dict[str, T] = {}

    def register(self, identifier: str, value: T) -> None:
        """Add a value.

        Raises:
            TypeError: the identifier is not a non-empty string.
            DuplicateNameError: another value has the identifier; the message names both.
        """
        if not isinstance(identifier, str) or not identifier:
            raise TypeError(f"{self.kind} identifier must be a non-empty str, got {identifier!r}")
        with _lock:
            if identifier in self._values:
                taken = _describe(self._values[identifier])
                raise DuplicateNameError(
                    f"{self.kind} {identifier!r} is already registered: {taken}; "
                    f"choose another identifier for {_describe(value)}"
                )
            self._values[identifier] = value
            self.version += 1

    def resolve(self, identifier: str) -> T:
        """Return the value of that name.

        Raises:
            UnknownNameError: there is none, also after all plugs were loaded; a near name is suggested.
        """
        if identifier not in self._values:
            load_plugins()
        try:
            return self._values[identifier]
        except (KeyError, TypeError):
            hint = suggestion(str(identifier), list(self._values))
            raise UnknownNameError(f"unknown {self.kind}: {identifier!r}{hint}") from None

    def names(self) -> list[str]:
        """Return the identifiers registered so far; loads nothing."""
        return list(self._values)

    def get_all(self) -> list[T]:
        """Return all values, those of every plug included, in order of registration."""
        load_plugins()
        with _lock:
            return list(self._values.values())

    def remove(self, identifier: str) -> T:
        """Take a value out and return it.

        Raises:
            UnknownNameError: there is no such value.
        """
        value = self.resolve(identifier)
        with _lock:
            self._values.pop(identifier, None)
            self.version += 1
        return value

    def __contains__(self, identifier: object) -> bool:
        if identifier not in self._values:
            load_plugins()
        return identifier in self._values

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        with _lock:
            return iter(list(self._values))

    def __len__(self) -> int:
        load_plugins()
        return len(self._values)


def _load_entry_point(entry_point: importlib.metadata.EntryPoint) -> None:
    try:
        plug = entry_point.load()
        if not isinstance(plug, ModuleType):
            plug()
    except Exception:
        distribution = getattr(entry_point, "dist", None)
        source = f" of distribution {distribution.name!r}" if distribution is not None else ""
        _logger.exception(
            "plug-in %r (%s)%s failed to load and is left out", entry_point.name, entry_point.value, source
        )


def _being_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _describe(value: object) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '?')}.{getattr(named, '__qualname__', named)}"
