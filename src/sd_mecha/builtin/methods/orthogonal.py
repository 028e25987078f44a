"""Orthogonal maps: the one that takes one matrix nearest to another, and its powers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sd_mecha.builtin.methods.angles import Angles

PART = 1 << 20
"""Elements of a large matrix that are worked on at a time where rows can be taken one by one."""


@dataclass(frozen=True)
class OrthogonalMap:
    """An orthogonal map of row vectors, `x -> x @ Q`, that leaves alone what is orthogonal to `frame`.

    Attributes:
        core: Q itself, or in coordinates of the frame.
        frame: orthonormal columns that span what moves; None for the whole space.
        weakest: the pair of directions `u -> v` that the map has least reason for. Reversing it makes a
            reflection a rotation.
    """

    core: Tensor
    frame: Tensor | None = None
    weakest: tuple[Tensor, Tensor] | None = None

    def apply(self, x: Tensor) -> Tensor:
        return in_parts(self._apply, x)

    def _apply(self, x: Tensor) -> Tensor:
        if self.frame is None:
            return x @ self.core
        inside = x @ self.frame
        moved = torch.addmm(inside, inside, self.core, beta=-1)
        del inside
        return torch.addmm(x, moved, self.frame.mT)

    def inverse(self) -> OrthogonalMap:
        return OrthogonalMap(self.core.mT, self.frame)

    def then(self, other: OrthogonalMap) -> OrthogonalMap:
        """This map and after it another one of the same frame."""
        return OrthogonalMap(self.core @ other.core, self.frame)

    def power(self, exponent: float) -> OrthogonalMap:
        """The map `exponent` times over; a fraction of the way for a fraction.

        A reflection has no fractional power among orthogonal maps: `rotation` is taken in its place.
        """
        if exponent == 1:
            return self
        if float(exponent).is_integer():
            base = self.core if exponent >= 0 else self.core.mT
            return OrthogonalMap(torch.linalg.matrix_power(base, abs(int(exponent))), self.frame)
        return OrthogonalMap(self.rotation._angles.power(exponent).to(self.core), self.frame)

    @cached_property
    def rotation(self) -> OrthogonalMap:
        """The nearest map that does not reflect: this one, or the one with its weakest direction reversed."""
        if self.weakest is None or float(torch.linalg.slogdet(self.core).sign) > 0:
            return self
        u, v = self.weakest
        return OrthogonalMap(torch.addr(self.core, u, v, alpha=-2), self.frame)

    @cached_property
    def _angles(self) -> Angles:
        return Angles.of(self.core)


@dataclass(frozen=True)
class Alignment:
    """What takes the rows of one matrix nearest to those of another.

    Attributes:
        left, right: orthonormal columns: directions of the one matrix, and those of the other that they go to.
        is_all: whether the rows of both matrices have no other directions.
    """

    left: Tensor
    right: Tensor
    is_all: bool

    def apply(self, x: Tensor) -> Tensor:
        """Turn rows all the way."""
        if not self.is_all:
            return self.map.apply(x)
        return in_parts(lambda part: (part @ self.left) @ self.right.mT, x)

    @cached_property
    def map(self) -> OrthogonalMap:
        """The map of the whole space; what is not aligned is turned as little as possible."""
        columns, rank = self.left.shape
        if 2 * rank >= columns:
            frame, left, right = None, self.left, self.right
            free_left = _complement(left)
        else:  # nothing moves but what these directions span
            outside = _orthonormal_to(self.left, self.right - self.left @ (self.left.mT @ self.right))
            frame = torch.cat([self.left, outside], 1)
            del outside
            everything = torch.eye(2 * rank).to(self.left)
            left, right, free_left = everything[:, :rank], frame.mT @ self.right, everything[:, rank:]
        free_right = _complement(right)
        u, _, vh = torch.linalg.svd(free_left.mT @ free_right)
        core = (left @ right.mT).addmm_(free_left @ (u @ vh), free_right.mT)
        weakest = None
        if free_left.shape[1]:
            weakest = (free_left @ u[:, -1], free_right @ vh[-1])
        elif rank:
            weakest = (left[:, -1].clone(), right[:, -1].clone())
        found = OrthogonalMap(core, frame, weakest)
        # where nothing but the sign of one direction is free, as in square matrices of rows with mean zero
        return found.rotation if columns - rank == 1 else found


def procrustes(x: Tensor, y: Tensor, shift_x: Tensor | None = None, shift_y: Tensor | None = None) -> Alignment:
    """The orthogonal Q that minimises `|x @ Q - y|`, and of all those the one nearest to doing nothing.

    Only directions that rows of both matrices have are aligned. If one direction remains, its sign is such that Q
    does not reflect. Where there are fewer rows than columns, all work is done on the side of the rows.

    Args:
        x, y: the matrices.
        shift_x, shift_y: a row that is taken from each of their rows first; None for zero.
    """
    if x.shape[0] >= x.shape[1]:
        cross = x.new_zeros(x.shape[1], x.shape[1])
        for part_x, part_y in zip(_shifted(x, shift_x), _shifted(y, shift_y), strict=True):
            cross.addmm_(part_x.mT, part_y)
        left, s, vh = torch.linalg.svd(cross)
        right = vh.mT
    else:
        frame_x, side_x = _frame(x, shift_x)
        frame_y, side_y = _frame(y, shift_y)
        cross = side_x @ side_y.mT
        del side_x, side_y
        u, s, vh = torch.linalg.svd(cross)
        left = frame_x @ u
        del frame_x
        right = frame_y @ vh.mT
        del frame_y
    # no smaller than what rounding makes of zeros, no larger than need be: weak directions are turned too
    rank = int((s > s[:1] * math.sqrt(max(x.shape)) * 4 * torch.finfo(s.dtype).eps).sum())
    is_all = _has_little(x, shift_x, left[:, rank:]) and _has_little(y, shift_y, right[:, rank:])
    return Alignment(left[:, :rank], right[:, :rank], is_all)


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a function makes of the rows of a matrix, a few of them at a time, so that its own steps need little."""
    rows = _rows_at_once(x)
    if len(x) <= rows:
        return function(x)
    result = torch.empty_like(x)
    for made, part in zip(torch.split(result, rows), torch.split(x, rows), strict=True):
        made.copy_(function(part))
    return result


def _rows_at_once(x: Tensor) -> int:
    return max(PART // x.shape[1], 1)


def _shifted(x: Tensor, shift: Tensor | None) -> Iterator[Tensor]:
    """The rows of a matrix, some at a time, less a row."""
    for part in torch.split(x, _rows_at_once(x)):
        yield part if shift is None else part - shift


def _frame(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span the rows of a wide matrix, and the rows in their coordinates, as columns."""
    frame, side = torch.linalg.qr((x if shift is None else x - shift).mT)
    return frame, side


def _has_little(x: Tensor, shift: Tensor | None, directions: Tensor) -> bool:
    """Whether rows have no more in some directions than what rounding may have left."""
    if directions.shape[1] == 0:
        return True
    part = whole = 0.0
    for rows in _shifted(x, shift):
        part = math.hypot(part, float(torch.linalg.matrix_norm(rows @ directions)))
        whole = math.hypot(whole, float(torch.linalg.matrix_norm(rows)))
    return part <= math.sqrt(torch.finfo(x.dtype).eps) * whole


def _complement(vectors: Tensor) -> Tensor:
    """Orthonormal columns that complete orthonormal ones to a basis."""
    n, count = vectors.shape
    if count == 0:
        return torch.eye(n).to(vectors)
    if 0 < (n - count) * 8 <= n:  # a few are found sooner by taking the rest out of any others
        drawn = torch.randn(n, n - count, dtype=vectors.dtype, generator=torch.Generator().manual_seed(0))
        return _orthonormal_to(vectors, drawn.to(vectors.device))
    basis: Tensor = torch.linalg.qr(vectors, mode="complete").Q
    return basis[:, count:].clone()  # the rest of the basis need not be kept


def _orthonormal_to(vectors: Tensor, others: Tensor) -> Tensor:
    """As many orthonormal columns as there are `others`, which span those and are orthogonal to `vectors`."""
    basis: Tensor = torch.linalg.qr(others).Q
    for _ in range(2):  # what is left of a column in the span of `vectors` is rounding, and may point anywhere
        basis = torch.linalg.qr(basis - vectors @ (vectors.mT @ basis)).Q
    return basis


def fractional_orthogonal_matrix_power(q: Tensor, power: float) -> Tensor:
    """A power of a rotation matrix; 0.5 turns every plane by half its angle.

    Args:
        q: a rotation matrix: orthogonal, of determinant 1.
        power: any number.
    """
    return Angles.of(q).power(power).to(q)
