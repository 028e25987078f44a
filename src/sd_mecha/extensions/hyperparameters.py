"""Hyper-parameters that say where a file tells them: the fields of the dataclass of a config family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

from sd_mecha.extensions.header import Header

H = TypeVar("H")

_READ = "read"


def size(pattern: str, axis: int, *others: str | tuple[str, int], per: int = 1) -> Any:
    """A field that is the size of an axis of a tensor.

    Args:
        pattern: of its keys, see `Header`.
        axis: which one.
        others: where else to look if the file lacks it: patterns for the same axis, or pattern and axis.
        per: what the size is to be divided by.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> from sd_mecha.storage.contract import TensorEntry
    >>> @dataclass(frozen=True)
    ... class Toy:
    ...     width: int = size("layers.*.mlp.weight", 1)
    ...     depth: int = count("layers")
    ...     guided: int = flag("guidance.weight")
    >>> reader(Toy)(Header({"layers.3.mlp.weight": TensorEntry((8, 4), torch.float32)}))
    Toy(width=4, depth=4, guided=0)
    """
    places = [(pattern, axis), *((other, axis) if isinstance(other, str) else other for other in others)]
    return read_by(lambda header: header.either(*places) // per)


def count(*groups: str) -> Any:
    """A field that is the number of members of a group, the largest of several."""
    return read_by(lambda header: max(map(header.count, groups)))


def flag(*patterns: str) -> Any:
    """A field that is 1 where a file has keys of any of the patterns, 0 elsewhere."""
    return read_by(lambda header: int(header.has(*patterns)))


def read_by(read: Callable[[Header], int]) -> Any:
    """A field that a function of the header gives."""
    return field(metadata={_READ: read})


def reader(hyper: type[H], check: Callable[[Header], bool] | None = None) -> Callable[[Header], H]:
    """The `read` of a layout, for a dataclass all of whose fields are `size`, `count`, `flag` or `read_by`.

    Args:
        hyper: the dataclass.
        check: tells whether a file is of the family; it refuses those of similar ones.
    """
    reads = {f.name: f.metadata[_READ] for f in fields(hyper)}  # type: ignore[arg-type]

    def read(header: Header) -> H:
        if check is not None and not check(header):
            raise LookupError(f"other layers than those of {hyper.__name__}")
        return hyper(**{name: read(header) for name, read in reads.items()})

    return read


def widens(ratio: int, *patterns: str) -> Callable[[Header], bool]:
    """A check that matrices of any of the patterns have `ratio` times as many columns as rows."""

    def check(header: Header) -> bool:
        rows, columns, *_ = header.shape(*patterns)
        return columns == ratio * rows

    return check
