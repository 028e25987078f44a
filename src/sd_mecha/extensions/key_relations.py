"""What a key map is made of: relations between output keys and the input keys that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sd_mecha.extensions.key_clauses import Clause


class KeyRelation:
    """One call of a merge method: the keys that it makes and the alternatives that it can make them from."""

    __slots__ = ("clauses", "outputs")

    def __init__(self, outputs: tuple[str, ...], clauses: tuple[Clause, ...]) -> None:
        self.outputs = outputs
        self.clauses = clauses

    def __iter__(self) -> Iterator[Any]:
        return iter((self.outputs, self.clauses))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyRelation):
            return NotImplemented
        return self.outputs == other.outputs and self.clauses == other.clauses

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"KeyRelation(outputs={self.outputs!r}, clauses={self.clauses!r})"


@dataclass(frozen=True)
class RealizedKeyRelation:
    """A relation with its alternative chosen; what a merge method receives as `key_relation`."""

    outputs: tuple[str, ...]
    inputs: Mapping[str, tuple[str, ...]]
    meta: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.outputs, self.inputs))


Available = Callable[[str, str], bool]
"""(parameter, key) -> whether every input of that parameter can produce the key."""

Report = Callable[[Available], Iterable[str]]
"""What a map leaves out of inputs that can produce these keys: one text for each thing that a user should know."""


class KeyMap(Mapping[str, KeyRelation]):
    """Output key -> the relation that makes it.

    Args:
        relations: in order.
        reports: see `KeyMapBuilder.report`.
    """

    def __init__(self, relations: Iterable[KeyRelation], reports: Iterable[Report] = ()) -> None:
        self.reports = tuple(reports)
        self._by_key = {key: relation for relation in relations for key in relation.outputs}

    @property
    def relations(self) -> list[KeyRelation]:
        """Each relation once, in the order of the map."""
        return list({id(relation): relation for relation in self._by_key.values()}.values())

    def __getitem__(self, key: str) -> KeyRelation:
        return self._by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)


class ActiveKeyMap(Mapping[str, RealizedKeyRelation]):
    """Output key -> the realised relation that makes it; only keys that can be made."""

    def __init__(self, simple_map: Mapping[str, RealizedKeyRelation]) -> None:
        self.simple_map = simple_map

    def __getitem__(self, key: str) -> RealizedKeyRelation:
        return self.simple_map[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.simple_map)

    def __len__(self) -> int:
        return len(self.simple_map)


def realize(relation: KeyRelation, available: Available) -> RealizedKeyRelation | None:
    """Choose the first alternative whose inputs can all be had.

    Args:
        relation: what to choose from.
        available: (parameter, key) -> whether every input of that parameter can produce the key.

    Returns:
        The chosen inputs, or None if the keys cannot be made.
    """
    for clause in relation.clauses:
        if all(available(param, key) for param, keys in clause.by_param.items() for key in keys):
            return RealizedKeyRelation(relation.outputs, clause.by_param, clause.meta)
    return None


def identity_key_map(params: Iterable[str], keys: Iterable[str]) -> KeyMap:
    """Return the map of a method without `map_keys`: output key k needs key k of every parameter."""
    names = tuple(params)
    return KeyMap(KeyRelation((key,), (Clause(dict.fromkeys(names, (key,))),)) for key in keys)
