"""What a merge method may say about the input keys that an output key needs.

A `Clause` names keys of some parameters, all of which it needs; `ReqExpr` is a list of clauses in order of
preference. Both combine with `&` (needs both), `|` (this one, else that one) and `@` (attach an object that
the method finds in `key_relation.meta`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from sd_mecha.errors import MechaError


class KeyMapError(MechaError, ValueError):
    """A `map_keys` contradicts itself or the configs that it maps between."""


class UnknownMapKeyError(KeyMapError, KeyError):
    """A `map_keys` names a key that the config does not have."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class UnknownMapParameterError(KeyMapError, AttributeError):
    """A `map_keys` names a parameter that the merge method does not have."""


class Requirement:
    """Common algebra of one clause and of several alternatives."""

    __slots__ = ()

    @property
    @abstractmethod
    def clauses(self) -> tuple[Clause, ...]:
        """The alternatives, the preferred one first."""

    def __and__(self, other: Requirement) -> Requirement:
        if not isinstance(other, Requirement):
            return NotImplemented
        return _expression(tuple(left._joined(right) for left in self.clauses for right in other.clauses))

    def __or__(self, other: Requirement | None) -> Requirement:
        if other is None:
            return self
        if not isinstance(other, Requirement):
            return NotImplemented
        return ReqExpr(self.clauses + other.clauses)

    def __ror__(self, other: None) -> Requirement:
        return self if other is None else NotImplemented

    def __matmul__(self, meta: Any) -> Requirement:
        return _expression(tuple(clause._with_meta(meta) for clause in self.clauses))


class Clause(Requirement):
    """Keys that are needed together.

    Attributes:
        by_param: parameter name -> keys of it; not to be changed.
        meta: the object attached with `@`, or None.
    """

    __slots__ = ("by_param", "meta")

    def __init__(self, by_param: Mapping[str, tuple[str, ...]], meta: Any = None) -> None:
        self.by_param = by_param
        self.meta = meta

    @property
    def clauses(self) -> tuple[Clause, ...]:
        return (self,)

    def _joined(self, other: Clause) -> Clause:
        by_param = dict(self.by_param)
        for param, keys in other.by_param.items():
            mine = by_param.get(param)
            by_param[param] = keys if not mine else tuple(dict.fromkeys(mine + keys))
        if self.meta is None or other.meta is None:
            return Clause(by_param, other.meta if self.meta is None else self.meta)
        try:
            return Clause(by_param, self.meta | other.meta)
        except TypeError:
            raise KeyMapError(
                f"cannot join the metas {self.meta!r} and {other.meta!r} of two clauses with `|`; "
                "attach dicts or ComposeObject classes, or attach one meta to the joined clause"
            ) from None

    def _with_meta(self, meta: Any) -> Clause:
        if self.meta is not None:
            raise KeyMapError(f"cannot attach {meta!r} to a clause that already has the meta {self.meta!r}")
        return Clause(self.by_param, meta)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clause):
            return NotImplemented
        return dict(self.by_param) == dict(other.by_param) and bool(self.meta == other.meta)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Clause({dict(self.by_param)!r}, meta={self.meta!r})"


class ReqExpr(Requirement):
    """Alternatives in order of preference."""

    __slots__ = ("_clauses",)

    def __init__(self, clauses: tuple[Clause, ...]) -> None:
        self._clauses = tuple(clauses)

    @property
    def clauses(self) -> tuple[Clause, ...]:
        return self._clauses

    def __repr__(self) -> str:
        return f"ReqExpr({self._clauses!r})"


class _ComposeMeta(type):
    """Type of classes that are used as objects and joined with `|`."""

    _composed: ClassVar[dict[tuple[type, ...], type]] = {}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{cls.__name__} is used as an object itself; write `{cls.__name__}`, not a call")

    def __or__(cls, other: Any) -> Any:
        if not isinstance(other, _ComposeMeta):
            return type.__or__(cls, other) if isinstance(other, type) else NotImplemented
        parts = tuple(dict.fromkeys(cls._parts() + other._parts()))
        parts = tuple(p for p in parts if not any(q is not p and issubclass(q, p) for q in parts))
        if len(parts) == 1:
            return parts[0]
        if parts not in _ComposeMeta._composed:
            name = "__".join(part.__name__ for part in parts)
            _ComposeMeta._composed[parts] = _ComposeMeta(name, parts, {"_parts_joined": parts})
        return _ComposeMeta._composed[parts]

    def _parts(cls) -> tuple[type, ...]:
        return tuple(cls.__dict__.get("_parts_joined", (cls,)))


class ComposeObject(metaclass=_ComposeMeta):
    """Base of class objects that travel as the meta of a clause.

    Such a class is never instantiated: its class methods and attributes are the object. `A | B` has those of
        both,
    A's where both define one, and is the same class each time.
    """


def _expression(clauses: tuple[Clause, ...]) -> Requirement:
    return clauses[0] if len(clauses) == 1 else ReqExpr(clauses)
