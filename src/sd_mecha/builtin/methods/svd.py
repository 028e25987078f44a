"""Low-rank truncation: the part of a delta that its leading singular vectors hold."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_range
from sd_mecha.errors import ParameterError
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method

OVERSAMPLING = 24
"""Vectors that a random basis holds beyond the rank asked for, where no seed asks for the basis of 1.1.8."""


@merge_method(cache_factory=dict)
def truncate_rank(
    a: Parameter(Tensor, "delta"),
    rank: Parameter(int) = 8,
    use_approximate_basis: Parameter(bool) = True,
    approximate_basis_iters: Parameter(int) = 2,
    approximate_basis_seed: Parameter(int) = None,
    **kwargs: Any,
) -> Return(Tensor, "delta"):
    """Keep the part of a delta that a matrix of low rank can hold, as a LoRA of that rank would.

    Formula: `u[:, :rank] @ diag(s[:rank]) @ vh[:rank]` of the singular value decomposition of each tensor,
    flattened to `shape[0]` rows; scalars and vectors are kept as they are.

    Args:
        a: a delta.
        rank: any integer; how many singular values are kept. 0 and less keep none, the smaller side of the
            matrix and more keep all.
        use_approximate_basis: find the leading vectors by a randomised subspace iteration instead of a full
            decomposition; much faster at low rank, and exact for a delta that has that rank.
        approximate_basis_iters: at least 0; rounds of that iteration. More are more accurate.
        approximate_basis_seed: draws the `rank` random vectors that sd-mecha 1 drew for that seed; without
            one, a fixed set of 24 more than `rank` is used, which is more accurate.

    Use when: a delta should lose its noise, or to see what a LoRA of that rank can express.
    Cost: whole tensor. Randomised: a few products with rank + 24 vectors; else a full decomposition. With a
    `cache`, decompositions are kept and reused for every rank up to that of the first merge.
    Source: Eckart & Young 1936; Halko, Martinsson & Tropp, arXiv 0909.4061.

    >>> truncate_rank.__wrapped__(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1).round().abs()
    tensor([[3., 0.],
            [0., 0.]])
    """
    check_range("truncate_rank", "approximate_basis_iters", approximate_basis_iters, 0)
    if a.dim() < 2 or rank >= min(matrix_shape(a)) or a.is_meta:
        return a.clone()
    if rank <= 0:
        return torch.zeros_like(a)
    u, s, vh = leading_vectors(
        as_matrix(a),
        rank,
        use_approximate_basis,
        approximate_basis_iters,
        approximate_basis_seed,
        cache_entry(kwargs),
    )
    return ((u * s) @ vh).to(a.dtype).reshape(a.shape)


@merge_method(tiling="shape", reuse_outputs=False)
def get_rank_from_ratio(
    a: Parameter(Tensor, {"weight", "delta"}),
    ratio: Parameter(float) = 0.5,
) -> Return(int, "param"):
    """Turn a share of the largest possible rank into a rank for each tensor, for `truncate_rank`.

    Formula: `round(ratio * min(rows, columns))` of the tensor flattened to `shape[0]` rows; 1 is the largest
    rank of scalars and vectors. Halves round to the even neighbour.

    Args:
        a: weights or a delta; only its shapes matter.
        ratio: in [0, 1]; values outside count as the nearer end.

    Use when: large tensors should keep a higher rank than small ones.
    Cost: shapes alone, while planning; no tensor is read.
    Source: none; bookkeeping.

    >>> get_rank_from_ratio.__wrapped__(torch.zeros(8, 20), 0.25)
    2
    """
    if math.isnan(ratio):
        raise ParameterError("get_rank_from_ratio: ratio is nan; expected a number in [0, 1]")
    return round(min(max(ratio, 0.0), 1.0) * min(matrix_shape(a)))


def matrix_shape(a: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor flattened to `shape[0]` rows; a scalar or a vector is one column."""
    if a.dim() < 2:
        return a.numel(), 1
    return a.shape[0], math.prod(a.shape[1:])


def as_matrix(a: Tensor) -> Tensor:
    """The tensor with `shape[0]` rows, in a dtype that can be decomposed."""
    return a.flatten(1).to(torch.promote_types(a.dtype, torch.float32))


def cache_entry(context: dict[str, Any]) -> MutableMapping[str, Any]:
    """What the caller keeps for this key between merges; without a cache, a mapping to throw away."""
    cache: MutableMapping[str, Any] | None = context.get("cache")
    entry: MutableMapping[str, Any] = {} if cache is None else cache.setdefault(context["key"], {})
    return entry


def leading_vectors(
    a: Tensor, rank: int, approximate: bool, iters: int, seed: int | None, kept: MutableMapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """`u, s, vh` of the `rank` largest singular values, from `kept` where a decomposition of that kind lies there."""
    kind = {"iters": iters, "seed": seed} if approximate else {"iters": None, "seed": None}
    fits = "u" in kept and kept["u"].shape[0] == a.shape[0] and kept["vh"].shape[1] == a.shape[1]
    if not (fits and all(kept.get(name) == value for name, value in kind.items()) and len(kept["s"]) >= rank):
        u, s, vh = svd_lowrank(a, rank, iters, seed) if approximate else thin_svd(a)
        kept.clear()
        kept.update({"u": u, "s": s, "vh": vh, **kind})
    u, s, vh = (kept[name].to(a) for name in ("u", "s", "vh"))
    return u[:, :rank], s[:rank], vh[:rank]


def thin_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a matrix, worked out on its smaller side: `a = u @ diag(s) @ vh`."""
    if a.shape[0] < a.shape[1]:
        u, s, vh = thin_svd(a.mT)
        return vh.mT, s, u.mT
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u, s, vh


def svd_lowrank(a: Tensor, rank: int, iters: int = 2, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """About the `rank` largest singular values of a matrix and their vectors, by randomised subspace iteration.

    Args:
        a: a matrix.
        rank: how many.
        iters: rounds of the iteration; each sharpens the basis by two products with the matrix.
        seed: of the random basis, of `rank` vectors then; None takes a fixed one of a few more.

    Returns:
        `u, s, vh` with `a` about `u @ diag(s) @ vh`.
    """
    if a.shape[0] < a.shape[1]:
        u, s, vh = svd_lowrank(a.mT, rank, iters, seed)
        return vh.mT, s, u.mT
    width = rank + OVERSAMPLING if seed is None else rank
    if min(width, rank + OVERSAMPLING) >= a.shape[1]:
        u, s, vh = thin_svd(a)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator().manual_seed((seed or 0) % 2**64)
    start = torch.randn(a.shape[1], width, dtype=a.dtype, generator=generator).to(a.device)
    basis = _orthonormal(a @ start)
    for _ in range(iters):
        basis = _orthonormal(a @ _orthonormal(a.mT @ basis))
    u, s, vh = thin_svd(basis.mT @ a)
    return basis @ u[:, :rank], s[:rank], vh[:rank]


def _orthonormal(vectors: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(vectors).Q
    return basis
