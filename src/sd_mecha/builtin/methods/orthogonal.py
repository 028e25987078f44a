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
        if float(exponent).is_integer():
            base = self.core if exponent >= 0 else self.core.mT
            return OrthogonalMap(torch.linalg.matrix_power(base, abs(int(exponent))), self.frame)
        return OrthogonalMap(self.rotation._angles.power(exponent).to(self.core), self.frame)

    @cached_property
    def rotation(self) -> OrthogonalMap:
        """The nearest map that does not reflect: this one, or the one with its weakest direction reversed."""
        if self.weakest is None or float(torch.linalg.slogdet(self.core.double()).sign) > 0:
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


def procrustes(x: Tensor, y: Tensor) -> OrthogonalMap:
    """The orthogonal Q that minimises `|x @ Q - y|`, and of all those the one nearest to doing nothing.

    Only directions that rows of both matrices have are aligned. If one direction remains, its sign is such that Q
    does not reflect. Where there are fewer rows than half the columns, all work is done on the side of the rows.
    """
    rows, columns = x.shape
    if 2 * rows >= columns:
        u, s, vh = torch.linalg.svd(x.mT @ y)
        left, right, frame = u, vh.mT, None
    else:
        (frame_x, side_x), (frame_y, side_y) = torch.linalg.qr(x.mT), torch.linalg.qr(y.mT)
        u, s, vh = torch.linalg.svd(side_x @ side_y.mT)
        frame = torch.linalg.qr(torch.cat([frame_x, frame_y], 1)).Q
        left, right = frame.mT @ (frame_x @ u), frame.mT @ (frame_y @ vh.mT)
    rank = int((s > s[:1] * max(x.shape) * torch.finfo(s.dtype).eps).sum())
    known_left, known_right = left[:, :rank], right[:, :rank]
    free_left, free_right = _complement(left, rank), _complement(right, rank)
    # what is left is turned as little as possible
    u, _, vh = torch.linalg.svd(free_left.mT @ free_right)
    left, right = torch.cat([known_left, free_left @ u], 1), torch.cat([known_right, free_right @ vh.mT], 1)
    found = OrthogonalMap(left @ right.mT, frame, (left[:, -1], right[:, -1]))
    # where nothing but the sign of one direction is free, as in square matrices of rows with mean zero
    return found.rotation if columns - rank == 1 else found


def _complement(vectors: Tensor, rank: int) -> Tensor:
    """Orthonormal columns that complete the first `rank` ones of `vectors` to a basis."""
    if vectors.shape[1] == vectors.shape[0]:
        return vectors[:, rank:]
    basis: Tensor = torch.linalg.qr(vectors[:, :rank], mode="complete").Q
    return basis[:, rank:]


def fractional_orthogonal_matrix_power(q: Tensor, power: float) -> Tensor:
    """A power of a rotation matrix; 0.5 turns every plane by half its angle.

    Args:
        q: a rotation matrix: orthogonal, of determinant 1.
        power: any number.
    """
    return Angles.of(q).power(power).to(q)
