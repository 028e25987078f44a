"""Statistics per row or per column of a tensor that is seen one flat tile at a time.

The columns of a tensor are what is left of it without its first dimension: a matrix of p rows and q columns has q
groups of p elements. Its rows are the slices along the first dimension. Each answer is a vector, one number for each
group, so memory grows with the number of groups and not with the tensor.

Answers do not depend on how the tensor was cut. Maxima commute. Sums are taken over leaves, ranges of elements that
follow from the shape alone, in float32 where the tensors have no more and its range is enough: a leaf that a tile
begins or ends in is kept until it is complete. Leaves are added up in float64 along a binary tree, each pair as soon
as both are there, so few sums wait at any time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sd_mecha.extensions.reductions import Reduction, State

LEAF = (1 << 15) - 1
"""Elements in a leaf at most: few enough for the caches, and too few for torch to share a sum among threads."""

LEAF_ELSEWHERE = 1 << 20
"""The same on devices where each operation takes long to begin."""

EXACT_FROM, EXACT_TO = 1e-25, 1e35
"""Sums of squares between which float32 neither overflows nor loses digits to small numbers."""


class Piece(NamedTuple):
    """Elements `start` to `stop` of a tile, which fold to a matrix along whose `dim` groups are reduced."""

    start: int
    stop: int
    groups: slice
    shape: tuple[int, int]
    dim: int


@dataclass(frozen=True)
class Groups:
    """How the elements of a tensor, in row-major order, fall into `count` groups of `size` elements each."""

    count: int
    size: int
    interleaved: bool

    @classmethod
    def columns(cls, shape: tuple[int, ...]) -> Groups:
        """One group for each position in the first row; a vector or a scalar is one column."""
        return cls(math.prod(shape[1:]), shape[0] if shape else 1, True)

    @classmethod
    def rows(cls, shape: tuple[int, ...]) -> Groups:
        """One group for each slice along the first dimension; a vector or a scalar is one row."""
        if len(shape) < 2:
            return cls(1, math.prod(shape), False)
        return cls(shape[0], math.prod(shape[1:]), False)

    def pieces(self, start: int, length: int) -> Iterator[Piece]:
        """Cut the tile of `length` elements from element `start` on where groups begin and end."""
        period = self.count if self.interleaved else self.size
        at = 0
        while at < length:
            row, offset = divmod(start + at, period)
            rows = (length - at) // period if offset == 0 else 0
            width = period if rows else min(period - offset, length - at)
            rows = max(rows, 1)
            groups = slice(offset, offset + width) if self.interleaved else slice(row, row + rows)
            yield Piece(at, at + rows * width, groups, (rows, width), 0 if self.interleaved else 1)
            at += rows * width

    def spread(self, values: Tensor, start: int, length: int) -> Tensor:
        """For each element of a tile the value of its group."""
        parts = [
            values[piece.groups].unsqueeze(piece.dim).expand(piece.shape).reshape(-1)
            for piece in self.pieces(start, length)
        ]
        return torch.cat(parts) if len(parts) != 1 else parts[0]


class GroupMax(Reduction):
    """The largest magnitude in each group, as a float64 vector."""

    def __init__(self, x: Tensor, groups: Groups) -> None:
        self.x = x
        self.groups = groups
        self.answer_shape = (groups.count,)

    def state(self, numel: int) -> State:
        return _MaxState(self)


class GroupGram(Reduction):
    """Inner products within each group, as a float64 matrix: a row for each pair of tensors, a column for each group.

    Pairs are ordered (0, 0), (0, 1), ..., (1, 1), (1, 2), ... A group whose products leave the range of float64, or
    that holds inf or NaN, gets NaN.

    Args:
        tensors: the tiles.
        groups: the groups.
        then: what to make of the matrix, once instead of for each tile: a number for each group, which is the answer.
    """

    def __init__(
        self, tensors: Sequence[Tensor], groups: Groups, then: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.tensors = tensors
        self.groups = groups
        self.then = then
        self.pairs = len(tensors) * (len(tensors) + 1) // 2
        self.answer_shape = (self.pairs, groups.count) if then is None else (groups.count,)

    def state(self, numel: int) -> State:
        return _GramState(self)


class _MaxState(State):
    def __init__(self, reduction: GroupMax) -> None:
        self.largest = torch.zeros(reduction.groups.count, dtype=torch.float64, device=reduction.x.device)
        self.lock = threading.Lock()

    def add(self, reduction: GroupMax, start: int) -> None:
        x = reduction.x.reshape(-1).abs()
        for piece in reduction.groups.pieces(start, x.numel()):
            found = x[piece.start : piece.stop].view(piece.shape).amax(piece.dim).to(torch.float64)
            with self.lock:
                known = self.largest[piece.groups]
                torch.maximum(known, found, out=known)

    def finish(self) -> Tensor:
        return self.largest


class _Leaf(NamedTuple):
    """Elements that are summed at once: whole rows of the matrix that the tensor folds to, or a part of one row."""

    start: int
    stop: int
    shape: tuple[int, int]
    groups: slice
    lane: int  # leaves of one lane are added up
    place: int  # in the lane
    places: int  # how many leaves the lane has


class _Leaves:
    """How a tensor is cut into leaves."""

    def __init__(self, groups: Groups, most: int) -> None:
        self.interleaved = groups.interleaved
        self.rows, self.columns = (groups.size, groups.count) if self.interleaved else (groups.count, groups.size)
        self.height = max(most // max(self.columns, 1), 1)
        self.width = min(self.columns, most)

    def at(self, element: int) -> _Leaf:
        """The leaf that an element belongs to."""
        row, column = divmod(element, self.columns)
        across, down = column // self.width, row // self.height
        top, left = down * self.height, across * self.width
        bottom, right = min(top + self.height, self.rows), min(left + self.width, self.columns)
        start, shape = top * self.columns + left, (bottom - top, right - left)
        if self.interleaved:
            groups, place = slice(left, right), (across, down, -(-self.rows // self.height))
        else:
            groups, place = slice(top, bottom), (down, across, -(-self.columns // self.width))
        return _Leaf(start, start + math.prod(shape), shape, groups, *place)


class _GramState(State):
    def __init__(self, reduction: GroupGram) -> None:
        device = reduction.tensors[0].device
        self.leaves = _Leaves(reduction.groups, LEAF if device.type == "cpu" else LEAF_ELSEWHERE)
        self.then = reduction.then
        self.answer = torch.zeros((reduction.pairs, reduction.groups.count), dtype=torch.float64, device=device)
        n = len(reduction.tensors)
        self.squares = [i * n - i * (i - 1) // 2 for i in range(n)]  # rows of the products of a tensor with itself
        self.parts: dict[int, tuple[list[Tensor], int]] = {}  # by start of the leaf: what is there of it, and how much
        self.waiting: dict[tuple[int, int, int], Tensor] = {}  # by lane, level and index: sums without their neighbour
        self.lock = threading.Lock()

    def add(self, reduction: GroupGram, start: int) -> None:
        tiles = [x.reshape(-1) for x in reduction.tensors]
        at, stop = start, start + tiles[0].numel()
        while at < stop:
            leaf = self.leaves.at(at)
            end = min(leaf.stop, stop)
            parts = [x[at - start : end - start] for x in tiles]
            entire = parts if end - at == leaf.stop - leaf.start else self._completed(leaf, at, parts)
            if entire is not None:
                self._join(leaf, self._products(leaf, entire))
            at = end

    def _completed(self, leaf: _Leaf, start: int, parts: list[Tensor]) -> list[Tensor] | None:
        """Keep parts of a leaf; the entire leaf once nothing is missing."""
        with self.lock:
            numel, length = leaf.stop - leaf.start, parts[0].numel()
            kept, known = self.parts.pop(leaf.start, ([], 0))
            kept = kept or [part.new_empty(numel) for part in parts]
            for whole, part in zip(kept, parts, strict=True):
                whole[start - leaf.start : start - leaf.start + length] = part
            self._settle()
            if known + length == numel:
                return kept
            self.parts[leaf.start] = kept, known + length
        return None

    def _products(self, leaf: _Leaf, tensors: list[Tensor]) -> Tensor:
        """The inner products within a leaf: a row for each pair, a column for each of its groups."""
        folded = [x.view(leaf.shape) for x in tensors]
        if self.answer.is_cpu and all(x.dtype != torch.float64 for x in folded):
            products = self._sums([x.float() for x in folded])
            smallest, largest = torch.aminmax(products[self.squares])
            if float(smallest) > EXACT_FROM and float(largest) < EXACT_TO:
                return products.double()
        return self._sums([x.double() for x in folded])

    def _sums(self, folded: list[Tensor]) -> Tensor:
        dim = 0 if self.leaves.interleaved else 1
        return torch.stack([(x * y).sum(dim) for i, x in enumerate(folded) for y in folded[i:]])

    def _join(self, leaf: _Leaf, sums: Tensor) -> None:
        """Add the sums of a leaf to those that wait for them."""
        with self.lock:
            level, index, count = 0, leaf.place, leaf.places
            while count > 1:
                if index ^ 1 < count:  # else there is no neighbour
                    other = self.waiting.pop((leaf.lane, level, index ^ 1), None)
                    if other is None:
                        self.waiting[leaf.lane, level, index] = sums
                        break
                    sums = sums + other
                level, index, count = level + 1, index // 2, -(-count // 2)
            else:
                self.answer[:, leaf.groups] = sums
            self._settle()

    def _settle(self) -> None:
        """Finish what was begun on tensors that several workers use: each of them has a stream of its own."""
        if self.answer.is_cuda:
            torch.cuda.current_stream(self.answer.device).synchronize()

    def finish(self) -> Tensor:
        products = torch.where(torch.isfinite(self.answer), self.answer, torch.nan)
        return products if self.then is None else self.then(products)
