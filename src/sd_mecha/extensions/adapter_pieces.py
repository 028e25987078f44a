"""The change of one key, made a few rows at a time: the model streams by, and a large change is never held.

What does not depend on the rows is found once for the key. A change that is the product of two matrices can be added
to what it changes without being made first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_mecha.extensions.adapter_changes import Change, parts_in
from sd_mecha.extensions.adapters import Product, Shape
from sd_mecha.extensions.tile import Tile, piece_of


class _Span(NamedTuple):
    """Rows of the key that one change has a part in."""

    start: int
    stop: int
    make: Product | Callable[[int, int], Tensor]  # the factors, already cut to these rows; or what makes some rows


class RowsOfChange:
    """Makes ranges of the change of one key.

    The bits are those of every other way to cut it: what is multiplied at once are always the same rows.

    Args:
        key: the key.
        changes: those that have a part in it, all of them `in_rows`.
        shape: of the change.
        adapter: the tensors that the changes name.

    Attributes:
        addable: whether the change can be added without being made.
    """

    def __init__(self, key: str, changes: Iterable[Change], shape: Shape, adapter: Mapping[str, Tensor]) -> None:
        self._width = math.prod(shape[1:])
        self._count = shape[0]
        piece = piece_of(shape)
        self._at_once = -(-piece // self._width)
        self._spans = [span for change in changes for span in _spans(key, change, adapter)]
        self._some = next(iter(adapter.values())).new_empty(0)
        # where tiles begin within rows, those would be made that the tile has no room for
        self.addable = piece % self._width == 0 and all(isinstance(span.make, Product) for span in self._spans)

    def __call__(self, tile: Tile) -> Tensor:
        """Elements `tile.start` to `tile.stop`, flat."""
        blocks = [self._block(first, last) for first, last in self._blocks(tile)]
        rows = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        before = tile.start // self._width // self._at_once * self._at_once * self._width
        return rows.reshape(-1)[tile.start - before : tile.stop - before]

    def add_to(self, total: Tensor, tile: Tile, weight: float) -> None:
        """Add the range times a number to `total`, which is modified; for changes that are `addable`."""
        first_row = tile.start // self._width
        rows = total.view(-1, self._width)
        for first, last in self._blocks(tile):
            for span, above, below in self._within(first, last):
                assert isinstance(span.make, Product)
                left = span.make.left[above - span.start : below - span.start]
                here = rows[above - first_row : below - first_row]
                here.addmm_(left, span.make.right, alpha=weight * span.make.scale)

    @staticmethod
    def join(terms: Sequence[tuple[RowsOfChange, float]]) -> RowsOfChange:
        """What adds several changes at once, each times its number: one product of wider matrices.

        Args:
            terms: `addable` changes of one `form`, with their numbers.
        """
        joined = copy(terms[0][0])
        joined._spans = [
            _Span(
                spans[0].start, spans[0].stop, _joined([span.make for span in spans], [number for _, number in terms])
            )
            for spans in zip(*(rows._spans for rows, _ in terms), strict=True)
        ]
        return joined

    @property
    def form(self) -> object:
        """What changes have in common that can be joined."""
        return self._width, self._count, [(span.start, span.stop) for span in self._spans], self._some.dtype

    def _blocks(self, tile: Tile) -> Iterator[tuple[int, int]]:
        """Yield the rows that are made at once, from the first to the last that the range touches."""
        size = self._width * self._at_once
        for number in range(tile.start // size, -(-tile.stop // size)):
            yield number * self._at_once, min((number + 1) * self._at_once, self._count)

    def _within(self, first: int, last: int) -> Iterator[tuple[_Span, int, int]]:
        for span in self._spans:
            above, below = max(first, span.start), min(last, span.stop)
            if above < below:
                yield span, above, below

    def _block(self, first: int, last: int) -> Tensor:
        found: Tensor | None = None
        for span, above, below in self._within(first, last):
            rows = self._rows(span, above, below)
            if (above, below) == (first, last):
                return rows
            if found is None:
                found = rows.new_zeros(last - first, self._width)
            found[above - first : below - first] = rows
        return self._some.new_zeros(last - first, self._width) if found is None else found

    def _rows(self, span: _Span, above: int, below: int) -> Tensor:
        above, below = above - span.start, below - span.start
        if not isinstance(span.make, Product):
            return span.make(above, below).reshape(-1, self._width)
        left = span.make.left[above:below]
        made = left.new_empty(below - above, self._width)
        return made.addmm_(left, span.make.right, beta=0, alpha=span.make.scale)


def _joined(factors: Sequence[Any], weights: Iterable[float]) -> Product:
    right = torch.cat([one.right for one in factors])
    left = right.new_empty(len(factors[0].left), len(right))
    place = 0
    for one, weight in zip(factors, weights, strict=True):
        torch.mul(one.left, weight * one.scale, out=left[:, place : place + len(one.right)])
        place += len(one.right)
    return Product(left, right)


def _spans(key: str, change: Change, adapter: Mapping[str, Tensor]) -> Iterator[_Span]:
    parts = change.tensors(adapter)
    factors = change.kind.factors(parts)
    for part, place in parts_in(key, change):
        if factors is not None:
            rows = factors.left[place : place + part.stop - part.start]
            yield _Span(part.start, part.stop, Product(rows, factors.right, factors.scale))
        else:
            yield _Span(part.start, part.stop, _maker(change, parts, place))


def _maker(change: Change, parts: Mapping[str, Tensor], place: int) -> Callable[[int, int], Tensor]:
    def rows(start: int, stop: int) -> Tensor:
        start, stop = start + place, stop + place
        return change.kind.delta(change.kind.cut(parts, start, stop), (stop - start, *change.link.shape[1:]), None)

    return rows
