"""Statistics per row or per column of a tensor that is seen one flat tile at a time.

The columns of a tensor are what is left of it without its first dimension: a matrix of p rows and q columns has q
groups of p elements. Its rows are the slices along the first dimension. Each answer is a vector, one number for each
group, so memory grows with the number of groups and not with the tensor.

Answers do not depend on how the tensor was cut. Maxima commute, and sums are taken over integers: each tensor is
divided, group by group, by a power of two at or above its largest element, and products are rounded to multiples of
one unit that is small enough to keep their precision and large enough not to overflow.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sd_mecha.extensions.reductions import Reduction, State

SMALLEST = 1e-290
"""Magnitudes up to here count as zero: the power of two above them has no reciprocal."""


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

    Pairs are ordered (0, 0), (0, 1), ..., (1, 1), (1, 2), ...

    Args:
        tensors: the tiles.
        bounds: what `GroupMax` answered for each of them.
        groups: the groups.
    """

    def __init__(self, tensors: Sequence[Tensor], bounds: Sequence[Tensor], groups: Groups) -> None:
        self.tensors = tensors
        self.groups = groups
        self.bounds = bounds
        self.answer_shape = (len(tensors) * (len(tensors) + 1) // 2, groups.count)

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


class _GramState(State):
    def __init__(self, reduction: GroupGram) -> None:
        bounds = torch.stack(tuple(reduction.bounds))
        # exactly the power of two that frexp splits off: pow and ldexp round, or leave the range of float32
        self.powers = torch.where(bounds > SMALLEST, bounds / torch.frexp(bounds).mantissa, 1.0)
        self.finite = torch.isfinite(bounds).all(0)
        self.unit = 2.0 ** (math.ceil(math.log2(max(reduction.groups.size, 1))) - 62)
        self.sums = torch.zeros(reduction.answer_shape, dtype=torch.int64, device=bounds.device)
        self.lock = threading.Lock()

    def add(self, reduction: GroupGram, start: int) -> None:
        groups, length = reduction.groups, reduction.tensors[0].numel()
        scaled = [
            x.reshape(-1).to(torch.float64) / groups.spread(power, start, length)
            for x, power in zip(reduction.tensors, self.powers, strict=True)
        ]
        products = (x * y for i, x in enumerate(scaled) for y in scaled[i:])
        for pair, product in enumerate(products):
            units = product.div_(self.unit).round_().to(torch.int64)
            for piece in groups.pieces(start, length):
                found = units[piece.start : piece.stop].view(piece.shape).sum(piece.dim)
                with self.lock:
                    self.sums[pair, piece.groups] += found

    def finish(self) -> Tensor:
        n = len(self.powers)
        scale = torch.stack([self.powers[i] * self.powers[j] for i in range(n) for j in range(i, n)])
        answer = self.sums.to(torch.float64) * self.unit * scale
        return torch.where(self.finite, answer, torch.nan)
