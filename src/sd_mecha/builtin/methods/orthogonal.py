"""Orthogonal maps: the one that takes one matrix nearest to another, and its powers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
        if self.frame is None:
            return x @ self.core
        moved = (x @ self.frame) @ (self.core - torch.eye(*self.core.shape).to(self.core))
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
        return OrthogonalMap(self.core - 2 * torch.outer(u, v), self.frame)

    @cached_property
    def _angles(self) -> Angles:
        return Angles.of(self.core)


@dataclass(frozen=True)
class Angles:
    """A rotation as planes and angles, from which any power of it follows."""

    vectors: Tensor  # orthonormal columns; the plane of column i is spanned by it and by column i of `partners`
    partners: Tensor
    angles: Tensor

    @classmethod
    def of(cls, rotation: Tensor) -> Angles:
        """Take a rotation apart.

        Its symmetric part has the cosines as eigenvalues. Its skew part takes each eigenvector to its partner
        in the plane, times the sine. Planes that turn by 180 degrees have no partner there; any two of their
        vectors make a pair.
        """
        q = rotation.double()
        cosines, vectors = torch.linalg.eigh((q + q.mT) / 2)
        partners = ((q - q.mT) / 2) @ vectors
        sines = torch.linalg.vector_norm(partners, dim=0)
        angles = torch.atan2(sines, cosines)
        partners = partners / torch.where(sines > 0, sines, 1.0)
        opposed = (sines < math.sqrt(torch.finfo(rotation.dtype).eps)) & (cosines < 0)
        half = vectors[:, opposed]
        count = half.shape[1] // 2 * 2
        swapped = half[:, :count].unflatten(1, (-1, 2)).flip(2).flatten(1)
        swapped[:, 1::2] *= -1
        where = opposed.nonzero().flatten()[:count]
        partners[:, where] = swapped
        angles[where] = math.pi
        return cls(vectors, partners, angles)

    def logarithm(self) -> Tensor:
        """The skew-symmetric matrix whose exponential is the rotation."""
        return (self.partners * self.angles) @ self.vectors.mT

    def power(self, exponent: float) -> Tensor:
        turned = self.angles * exponent
        return (self.vectors * torch.cos(turned) + self.partners * torch.sin(turned)) @ self.vectors.mT


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
        return (x @ self.left) @ self.right.mT if self.is_all else self.map.apply(x)

    @cached_property
    def map(self) -> OrthogonalMap:
        """The map of the whole space; what is not aligned is turned as little as possible."""
        columns, rank = self.left.shape
        if 2 * rank >= columns:
            frame, left, right = None, self.left, self.right
        else:  # nothing moves but what these directions span
            outside = _orthonormal_to(self.left, self.right - self.left @ (self.left.mT @ self.right))
            frame = torch.cat([self.left, outside], 1)
            left, right = torch.eye(2 * rank, rank).to(self.left), frame.mT @ self.right
        free_left, free_right = _complement(left), _complement(right)
        u, _, vh = torch.linalg.svd(free_left.mT @ free_right)
        left, right = torch.cat([left, free_left @ u], 1), torch.cat([right, free_right @ vh.mT], 1)
        weakest = (left[:, -1], right[:, -1]) if left.shape[1] else None
        found = OrthogonalMap(left @ right.mT, frame, weakest)
        # where nothing but the sign of one direction is free, as in square matrices of rows with mean zero
        return found.rotation if columns - rank == 1 else found


def procrustes(x: Tensor, y: Tensor) -> Alignment:
    """The orthogonal Q that minimises `|x @ Q - y|`, and of all those the one nearest to doing nothing.

    Only directions that rows of both matrices have are aligned. If one direction remains, its sign is such that Q
    does not reflect. Where there are fewer rows than columns, all work is done on the side of the rows.
    """
    if x.shape[0] >= x.shape[1]:
        u, s, vh = torch.linalg.svd(x.mT @ y)
        left, right = u, vh.mT
    else:
        (frame_x, side_x), (frame_y, side_y) = torch.linalg.qr(x.mT), torch.linalg.qr(y.mT)
        u, s, vh = torch.linalg.svd(side_x @ side_y.mT)
        left, right = frame_x @ u, frame_y @ vh.mT
    # no smaller than what rounding makes of zeros, no larger than need be: weak directions are turned too
    rank = int((s > s[:1] * math.sqrt(max(x.shape)) * 4 * torch.finfo(s.dtype).eps).sum())
    is_all = _is_small(x @ left[:, rank:], x) and _is_small(y @ right[:, rank:], y)
    return Alignment(left[:, :rank], right[:, :rank], is_all)


def _is_small(part: Tensor, whole: Tensor) -> bool:
    """Whether a part of a matrix is no more than what rounding may have left."""
    limit = math.sqrt(torch.finfo(whole.dtype).eps)
    return bool(torch.linalg.matrix_norm(part) <= limit * torch.linalg.matrix_norm(whole))


def _complement(vectors: Tensor) -> Tensor:
    """Orthonormal columns that complete orthonormal ones to a basis."""
    n, count = vectors.shape
    if count == 0:
        return torch.eye(n).to(vectors)
    basis: Tensor = torch.linalg.qr(vectors, mode="complete").Q
    return basis[:, count:]


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
