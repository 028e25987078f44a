"""Rotations as planes and angles, from which their powers and their logarithm follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WIDE_UP_TO = 1024
"""Rows and columns up to which a rotation is taken apart in float64, whatever its own dtype: it needs little then."""

OBTUSE = -0.9
"""Cosines up to here belong to angles that are too near 180 degrees to be told from their cosine."""


@dataclass(frozen=True)
class Angles:
    """The planes and angles of a rotation.

    The symmetric part S of a rotation has the cosines as eigenvalues, and its skew part K takes each eigenvector to
    its partner in the plane, times the sine. So any `even(angle)` and `odd(angle)` make a matrix,
    `even(S) + K (odd / sin)(S)`, which is as smooth in S as they are in the cosine: everywhere but near 180 degrees.
    There the partners themselves are kept.
    """

    rotation: Tensor
    vectors: Tensor  # orthonormal columns; the plane of each is spanned by it and by where the skew part takes it
    angles: Tensor  # in float64, the largest first
    partners: Tensor  # unit vectors, the partners of the first columns: those of obtuse angles

    @classmethod
    def of(cls, rotation: Tensor) -> Angles:
        """Take a rotation apart; a matrix of more than `WIDE_UP_TO` rows in its own dtype."""
        rounding = math.sqrt(torch.finfo(rotation.dtype).eps)
        if len(rotation) <= WIDE_UP_TO:
            rotation = rotation.double()
        cosines, vectors = torch.linalg.eigh(torch.add(rotation, rotation.mT).div_(2))
        angles = torch.acos(cosines.double().clamp_(-1, 1))
        count = int((cosines < OBTUSE).sum())
        obtuse, angles[:count], partners = _obtuse(rotation, vectors[:, :count], rounding)
        vectors[:, :count] = obtuse
        return cls(rotation, vectors, angles, partners.to(rotation))

    def logarithm(self) -> Tensor:
        """The skew-symmetric matrix whose exponential is the rotation."""
        return self._matrix(torch.zeros_like, torch.clone)

    def power(self, exponent: float) -> Tensor:
        return self._matrix(lambda angle: torch.cos(angle * exponent), lambda angle: torch.sin(angle * exponent))

    def _matrix(self, even: Callable[[Tensor], Tensor], odd: Callable[[Tensor], Tensor]) -> Tensor:
        """What an even and an odd function of the angles make of the vectors and of their partners."""
        count = self.partners.shape[1]
        others = self.angles[count:].clamp(min=1e-8)  # where the quotient below has a value, and does not change
        along = torch.cat([odd(self.angles[:count]), odd(others) / torch.sin(others)]).to(self.vectors)
        made = (self.rotation @ self.vectors).addmm_(self.rotation.mT, self.vectors, beta=0.5, alpha=-0.5)
        made[:, :count] = self.partners
        made.mul_(along).addcmul_(self.vectors, even(self.angles).to(made))
        return made @ self.vectors.mT


def _obtuse(rotation: Tensor, vectors: Tensor, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """What some eigenvectors of the symmetric part look like more closely: they, their angles and their partners.

    All of them are in float64. Planes that turn by 180 degrees, up to sines that rounding may have left, have no
    partner; any two of their vectors make a pair.
    """
    vectors = torch.linalg.qr(vectors.double()).Q
    ahead, back = _both_ways(rotation, vectors)
    within = vectors.mT @ ahead
    cosines, mix = torch.linalg.eigh((within + within.mT) / 2)
    vectors = vectors @ mix
    partners = (ahead.sub_(back) @ mix).div_(2)
    del ahead, back
    sines = torch.linalg.vector_norm(partners, dim=0)
    angles = torch.atan2(sines, cosines)
    partners.div_(torch.where(sines > 0, sines, 1.0))
    opposed = sines < rounding
    half = vectors[:, opposed]
    count = half.shape[1] // 2 * 2
    swapped = half[:, :count].reshape(len(half), count // 2, 2).flip(2).flatten(1)
    swapped[:, 1::2] *= -1
    where = opposed.nonzero().flatten()[:count]
    partners[:, where] = swapped
    angles[where] = math.pi
    return vectors, angles, partners


def _both_ways(rotation: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """A rotation times vectors, and its inverse times them, in float64 without a copy of the entire rotation."""
    ahead, back = torch.empty_like(vectors), torch.zeros_like(vectors)
    for made, rows, part in zip(*(torch.split(each, 256) for each in (ahead, rotation, vectors)), strict=True):
        wide = rows.double()
        torch.mm(wide, vectors, out=made)
        back.addmm_(wide.mT, part)
    return ahead, back
