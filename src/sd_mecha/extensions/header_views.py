"""A header asked by the names of another layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from sd_mecha.extensions.header import Header, Shape
from sd_mecha.extensions.layouts import Rule, RuleTable

H = TypeVar("H")


class TranslatedHeader(Header):
    """A header of one layout that is asked by the names of the layout that the rules start from.

    Args:
        header: of a file in the layout that the rules lead to.
        rules: from the layout whose names it is asked by.

    A tensor that is split has the rows of all its shares.
    """

    def __init__(self, header: Header, rules: Iterable[Rule]) -> None:
        super().__init__(header.entries, header.prefix)
        self._rules = RuleTable(rules)

    def count(self, group: str) -> int:
        stars = group.count("*")
        for rule in self._rules.rules:
            if rule.source.startswith(f"{group}.*"):
                found = super().count("*".join(rule.targets[0].split("*")[: stars + 1]).removesuffix("."))
                if found:
                    return found
        return 0

    def _shape(self, pattern: str) -> Shape | None:
        _, names = self._rules.find(pattern)
        shapes = [self._first(super(TranslatedHeader, self)._matching(name)) for name in names]
        known = [shape for shape in shapes if shape is not None]
        if not known or len(known) < len(names):
            return None
        return known[0] if len(names) == 1 else (sum(shape[0] for shape in known), *known[0][1:])

    def _matching(self, pattern: str) -> Iterable[str]:
        _, names = self._rules.find(pattern)
        return (key for name in names for key in super(TranslatedHeader, self)._matching(name))


def read_through(read: Callable[[Header], H], rules: Iterable[Rule]) -> Callable[[Header], H]:
    """A `read` for the layout that rules lead to, from that of the layout that they start from.

    Args:
        read: that of the first layout.
        rules: sizes of shares do not matter.
    """
    made = list(rules)
    return lambda header: read(TranslatedHeader(header, made))
