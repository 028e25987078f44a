"""What the keys and shapes of a file say about the network: how many layers, how wide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from sd_mecha.storage.contract import TensorEntry

Shape = tuple[int, ...]


class MissingShapeError(LookupError):
    """A file has no key, or none of known shape, from which a size can be read."""


class Header:
    """Keys and shapes, asked by patterns in which `*` stands for a number between dots.

    Args:
        entries: key -> shape and dtype, None where not known.
        prefix: only keys below it count, and they are named without it.

    Many keys match a pattern, one for each layer, and any of them answers: a file may lack some.

    >>> import torch
    >>> entry = TensorEntry((8, 4), torch.float32)
    >>> header = Header({f"layers.{i}.mlp.{j}": entry for i in range(3) for j in (0, 2)})
    >>> header.count("layers"), header.size("layers.*.mlp.2", 1), "layers.*.mlp.1" in header
    (3, 4, False)
    """

    def __init__(self, entries: Mapping[str, TensorEntry | None], prefix: str = "") -> None:
        self.entries = entries
        self.prefix = prefix
        self._keys: dict[str, list[str]] = {}  # with all numbers starred -> the keys, without the prefix
        self._counts: dict[str, int] = {}
        self._below: dict[str, Header] = {"": self}
        cut = len(prefix)
        for key in entries:
            if not key.startswith(prefix):
                continue
            name = key[cut:]
            parts = name.split(".")
            for place, part in enumerate(parts):
                if part.isdecimal():
                    number = int(part)
                    parts[place] = "*"
                    group = ".".join(parts[:place])
                    self._counts[group] = max(self._counts.get(group, 0), number + 1)
            self._keys.setdefault(".".join(parts), []).append(name)

    def below(self, prefix: str) -> Header:
        """The keys below another prefix."""
        if prefix not in self._below:
            self._below[prefix] = Header(self.entries, self.prefix + prefix)
        return self._below[prefix]

    def __contains__(self, pattern: object) -> bool:
        return isinstance(pattern, str) and any(True for _ in self._matching(pattern))

    def __iter__(self) -> Iterator[str]:
        """Every pattern that has keys, with all numbers as `*`."""
        return iter(self._keys)

    def has(self, *patterns: str) -> bool:
        """Whether any key matches any of the patterns."""
        return any(pattern in self for pattern in patterns)

    def sized(self, pattern: str) -> bool:
        """Whether the shape of a key that matches is known."""
        return self._shape(pattern) is not None

    def count(self, group: str) -> int:
        """How many numbered members a group has: one more than the greatest number in its place."""
        return self._counts.get(group, 0)

    def reach(self, *patterns: str) -> int:
        """One more than the greatest first number of the keys that match any of the patterns, 0 if none does."""
        keys = [key for pattern in patterns for key in self._matching(pattern)]
        return max((int(next(filter(str.isdecimal, key.split(".")))) + 1 for key in keys), default=0)

    def shape(self, *patterns: str) -> Shape:
        """The shape of a key that matches; of the first pattern that has one.

        Raises:
            MissingShapeError: no key matches, or its shape is not known.
        """
        for pattern in patterns:
            found = self._shape(pattern)
            if found is not None:
                return found
        raise MissingShapeError(f"no key like {' or '.join(patterns)}")

    def size(self, pattern: str, axis: int, *others: str) -> int:
        """The size of one axis of a key that matches the pattern, or else one of the others.

        Raises:
            MissingShapeError: no key matches, or its shape is not known.
            LookupError: it has fewer axes.
        """
        shape = self.shape(pattern, *others)
        if axis >= len(shape):
            raise LookupError(f"{pattern} has {len(shape)} axes")
        return shape[axis]

    def either(self, *places: tuple[str, int]) -> int:
        """The size of an axis of the first key that there is, by pattern and axis.

        Raises:
            MissingShapeError, LookupError: as `size`.
        """
        found = next((place for place in places if self.sized(place[0])), places[0])
        return self.size(*found)

    def agrees(self, shape: Callable[[str], Shape | None]) -> bool:
        """Whether a config gives most of the keys that it knows the shapes that they have, so far as those are known.

        Args:
            shape: key -> its shape in the config, None if it is unknown there.
        """
        known = [(entry.shape, shape(key)) for key, entry in self.entries.items() if entry is not None]
        same = [here == there for here, there in known if there is not None]
        return 2 * sum(same) >= len(same)

    def _shape(self, pattern: str) -> Shape | None:
        return self._first(self._matching(pattern))

    def _first(self, keys: Iterable[str]) -> Shape | None:
        """The first shape that is known."""
        entries = (self.entries[self.prefix + key] for key in keys)
        return next((entry.shape for entry in entries if entry is not None), None)

    def _matching(self, pattern: str) -> Iterable[str]:
        keys = self._keys.get(pattern)
        if keys is not None:
            return keys
        parts = pattern.split(".")
        keys = self._keys.get(".".join("*" if part.isdecimal() else part for part in parts), [])
        wanted = [(place, part) for place, part in enumerate(parts) if part.isdecimal()]
        return (key for key in keys if _has(key.split("."), wanted))


def _has(parts: list[str], wanted: list[tuple[int, str]]) -> bool:
    return all(parts[place] == part for place, part in wanted)
