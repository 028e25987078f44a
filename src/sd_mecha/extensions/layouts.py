"""Rules that turn one layout of a network into another: its keys renamed, their rows split, swapped or turned.

A layout is the way that a program names and packs the tensors of a network. Rules are written from one layout to
another; `links` applies them to the keys and shapes of the first and says what every tensor of the second is made
of. That gives the keys and shapes of the second, both conversions, and the places that an adapter's names mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """Where the tensors below a key go; made by `rename`, `split`, `swap`, `squeeze` and `transpose`."""

    source: str
    targets: tuple[str, ...]
    sizes: tuple[int, ...] | None = None  # rows of each target; None: equal shares
    kind: str = "rows"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows `start` to `stop` of a tensor."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Link:
    """What a tensor of the other layout is made of: rows of tensors, one below the other, in another form.

    Attributes:
        parts: the rows; a part that is a whole tensor starts at 0 and stops at its number of rows (0 for a scalar).
        shape: the shape of the result.
        turned: whether the rows are transposed; otherwise they are viewed in the shape.
    """

    key: str
    parts: tuple[Part, ...]
    shape: Shape
    turned: bool = False


def rename(source: str, target: str) -> Rule:
    """A tensor, or all tensors below a name, under another name.

    Args:
        source, target: `*` stands for a number between dots; those of the source are put into the target in order.
    """
    return Rule(source, (target,))


def keep(*names: str) -> list[Rule]:
    """Names that are the same in both layouts."""
    return [Rule(name, (name,)) for name in names]


def prefixed(keys: Iterable[str], prefix: str) -> list[Rule]:
    """All keys below a prefix, by the first parts of their names.

    >>> [rule.targets for rule in prefixed(["img_in.weight", "img_in.bias", "scale"], "net.")]
    [('net.img_in',), ('net.scale',)]
    """
    names = dict.fromkeys(key.partition(".")[0] for key in keys)
    return [Rule(name, (prefix + name,)) for name in names]


def below(rules: Iterable[Rule], prefix: str) -> list[Rule]:
    """The same rules where the keys of the first layout stand below a prefix."""
    return [replace(rule, source=prefix + rule.source) for rule in rules]


def split(source: str, *targets: str, sizes: Iterable[int] | None = None) -> Rule:
    """Tensors whose rows are those of several tensors, equally many of each where no sizes are given."""
    return Rule(source, targets, None if sizes is None else tuple(sizes))


def swap(source: str, target: str) -> Rule:
    """Tensors whose two halves change places, such as shift and scale."""
    return Rule(source, (target,), kind="swap")


def squeeze(source: str, target: str) -> Rule:
    """Convolutions of one pixel that become linear layers; what has fewer axes keeps its shape."""
    return Rule(source, (target,), kind="squeeze")


def transpose(source: str, target: str) -> Rule:
    """A matrix that is transposed."""
    return Rule(source, (target,), kind="transpose")


class RuleTable:
    """Rules by what they are of.

    >>> table = RuleTable([rename("blocks.*.mlp.0", "layers.*.up"), rename("blocks.*", "layers.*")])
    >>> table.find("blocks.3.mlp.0.bias")[1]
    ['layers.3.up.bias']
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = list(rules)
        self._table: dict[str, list[tuple[list[str], Rule]]] = {}
        for rule in self.rules:
            parts = rule.source.split(".")
            self._table.setdefault(".".join(map(_starred, parts)), []).append((parts, rule))
        for found in self._table.values():
            found.sort(key=lambda entry: entry[0].count("*"))

    def find(self, key: str) -> tuple[Rule | None, list[str]]:
        """The most specific rule for a key, and the names of what it becomes; None where no rule is for it.

        That is the longest one, and of those the one with the fewest stars.

        Args:
            key: a key, or a pattern with `*` for numbers.
        """
        parts = key.split(".")
        starred = list(map(_starred, parts))
        for length in range(len(parts), 0, -1):
            for pattern, rule in self._table.get(".".join(starred[:length]), ()):
                if all(p in ("*", part) for p, part in zip(pattern, parts, strict=False)):
                    numbers = [part for p, part in zip(pattern, parts, strict=False) if p == "*"]
                    return rule, [".".join([_filled(target, numbers), *parts[length:]]) for target in rule.targets]
        return None, []


def _starred(part: str) -> str:
    return "*" if part.isdecimal() else part


def _filled(target: str, numbers: list[str]) -> str:
    """The target with the numbers in place of its stars."""
    left = iter(numbers)
    return ".".join(next(left) if part == "*" else part for part in target.split("."))


def links(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> dict[str, Link]:
    """What each tensor of the other layout is made of.

    Args:
        rules: the most specific one that a key lies below counts; a key below none has no place in the other layout.
        shapes: the keys of the first layout.

    Raises:
        ValueError: rows cannot be divided as a rule says, or two rules make one key.
    """
    table = RuleTable(rules)
    made: dict[str, Link] = {}
    for key, shape in shapes.items():
        rule, names = table.find(key)
        for link in _links(rule, key, names, shape) if rule is not None else ():
            if link.key in made:
                raise ValueError(f"{link.key!r} is made of {made[link.key].parts[0].key!r} and of {key!r}")
            made[link.key] = link
    return made


def inverse(forward: Mapping[str, Link], shapes: Mapping[str, Shape]) -> dict[str, Link]:
    """What each tensor of the first layout is made of, if all of its rows lie in the other one.

    Args:
        forward: what `links` returned.
        shapes: the keys of the first layout.
    """
    pieces: dict[str, list[tuple[int, int, Part, Link]]] = {}
    for link in forward.values():
        place = 0
        for part in link.parts:
            rows = part.stop - part.start
            there = Part(link.key, place, _rows(link.shape) if link.turned else place + rows)
            pieces.setdefault(part.key, []).append((part.start, part.stop, there, link))
            place += rows
    back = {}
    for key, shape in shapes.items():
        found = sorted(pieces.get(key, ()), key=lambda piece: piece[0])
        covered = 0
        for start, stop, _, _ in found:
            if start != covered:
                break
            covered = stop
        if found and covered == _rows(shape):
            back[key] = Link(key, tuple(there for _, _, there, _ in found), shape, found[0][3].turned)
    return back


def _links(rule: Rule, key: str, names: list[str], shape: Shape) -> list[Link]:
    rows = _rows(shape)
    if rule.kind == "swap":
        half = rows // 2
        if 2 * half != rows:
            raise ValueError(f"{key!r} of shape {shape} has no two halves")
        return [Link(names[0], (Part(key, half, rows), Part(key, 0, half)), shape)]
    if rule.kind == "squeeze":
        flat = shape[:2] if shape[2:] == (1,) * (len(shape) - 2) else shape
        return [Link(names[0], (Part(key, 0, rows),), flat)]
    if rule.kind == "transpose":
        return [Link(names[0], (Part(key, 0, rows),), shape[::-1], turned=True)]
    if len(names) == 1:
        return [Link(names[0], (Part(key, 0, rows),), shape)]
    sizes = rule.sizes or (rows // len(names),) * len(names)
    if sum(sizes) != rows or len(sizes) != len(names):
        raise ValueError(f"{key!r} of shape {shape} cannot be divided into {len(names)} tensors of {sizes} rows")
    out, start = [], 0
    for name, size in zip(names, sizes, strict=True):
        out.append(Link(name, (Part(key, start, start + size),), (size, *shape[1:])))
        start += size
    return out


def _rows(shape: Shape) -> int:
    return shape[0] if shape else 0
