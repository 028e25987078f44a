"""The arithmetic: a matrix to two thin factors, and thin factors to thinner ones.

`up` is (rows, rank) and `down` (rank, columns); their product is the matrix, with no scale left to apply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_mecha.adapters.ranks import RankRule
from sd_mecha.builtin.methods.svd import OVERSAMPLING, svd_lowrank, thin_svd

_FIRST_GUESS = 32
"""How many singular values are looked for first where a share decides; four times as many each time it is too few."""


def low_rank(
    a: Tensor, rule: RankRule, kernel: bool, *, randomized: bool = True, iters: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The factors of low rank whose product is nearest to a matrix.

    Args:
        a: a matrix in float32 or better.
        rule: how much is kept of it.
        kernel: whether it is a kernel of more than one element, for `rule`.
        randomized: find the leading vectors by a randomised subspace iteration; a share then may take a vector more
            than a full decomposition would.
        iters: rounds of the iteration.
        seed: of its random vectors.
    """
    if not randomized:
        u, s, vh = thin_svd(a)
    elif rule.share is None:
        u, s, vh = _leading(a, rule.most(min(a.shape), kernel), iters, seed)
    else:
        u, s, vh = _until_enough(a, rule, kernel, iters, seed)
    return _balanced(u, s, vh, rule.choose(s, _energy(a), kernel))


def truncated(up: Tensor, down: Tensor, rule: RankRule, kernel: bool) -> tuple[Tensor, Tensor]:
    """The factors of lower rank whose product is nearest to that of two factors, without forming the product."""
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, s, vh = thin_svd(left.R @ right.R.mT)
    rank = rule.choose(s, float((s.double() ** 2).sum()), kernel)
    narrow_up, narrow_down = _balanced(u, s, vh, rank)
    return left.Q @ narrow_up, narrow_down @ right.Q.mT


def _leading(a: Tensor, count: int, iters: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `svd_lowrank`, which takes a seeded basis of just as many vectors as asked for; more are more accurate."""
    u, s, vh = svd_lowrank(a, min(count + OVERSAMPLING, *a.shape), iters, seed)
    return u[:, :count], s[:count], vh[:count]


def _until_enough(a: Tensor, rule: RankRule, kernel: bool, iters: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    full, total = min(a.shape), _energy(a)
    most, count = rule.most(full, kernel), _FIRST_GUESS
    while 2 * count < full:
        count = min(count, most)
        u, s, vh = _leading(a, count, iters, seed)
        if count == most or rule.enough(s.double() ** 2, total) is not None:
            return u, s, vh
        count *= 4
    return thin_svd(a)


def _balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _energy(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64)) ** 2


def product_norm(up: Tensor, down: Tensor) -> float:
    """The Frobenius norm of the product of two factors, without forming it."""
    left, right = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.mT, mode="r").R
    return float(torch.linalg.vector_norm(left @ right.mT, dtype=torch.float64))
