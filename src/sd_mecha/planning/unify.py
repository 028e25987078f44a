"""Union-find over facts that must agree, each class of nodes carrying its constraints and why they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

C = TypeVar("C")


class Classes(Generic[C]):
    """Disjoint classes of variables; every class has a list of constraints in the order they were given."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._constraints: dict[int, list[C]] = {}

    def new(self) -> int:
        self._parent.append(len(self._parent))
        self._size.append(1)
        return len(self._parent) - 1

    def find(self, variable: int) -> int:
        parent = self._parent
        while parent[variable] != variable:
            parent[variable] = parent[parent[variable]]
            variable = parent[variable]
        return variable

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        if self._size[a] < self._size[b]:
            a, b = b, a
        self._parent[b] = a
        self._size[a] += self._size[b]
        moved = self._constraints.pop(b, None)
        if moved:
            self._constraints.setdefault(a, []).extend(moved)

    def constrain(self, variable: int, constraint: C) -> None:
        self._constraints.setdefault(self.find(variable), []).append(constraint)

    def constraints(self, variable: int) -> list[C]:
        return self._constraints.get(self.find(variable), [])

    def roots(self) -> Iterator[int]:
        return (v for v, parent in enumerate(self._parent) if v == parent)
