"""Kronecker truncation: the part of a delta that one Kronecker product of two small matrices holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import MutableMapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_range
from sd_mecha.builtin.methods.svd import as_matrix, cache_entry, svd_lowrank, thin_svd
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method


@merge_method(cache_factory=dict)
def truncate_kronecker(
    a: Parameter(Tensor, "delta"),
    kronecker_ratio: Parameter(float) = 0.5,
    use_approximate_basis: Parameter(bool) = True,
    approximate_basis_iters: Parameter(int) = 2,
    approximate_basis_seed: Parameter(int) = None,
    **kwargs: Any,
) -> Return(Tensor, "delta"):
    """Keep the part of a delta that a Kronecker product of two smaller matrices can hold, as a LoKr would.

    Formula: the `b`, `c` that minimise `|a - kron(b, c)|`, for each tensor flattened to `shape[0]` rows; `b`
    has no part in the kernel of a convolution. Scalars and vectors are kept as they are.

    Args:
        a: a delta.
        kronecker_ratio: in [0, 1]; how the entries are shared out: `b` has about `n ** kronecker_ratio` of
            the n entries, `c` the rest. At 0.5 both are small; at 0, and for matrices at 1, one of them is
            the tensor itself, which is then kept.
        use_approximate_basis: find the factors by a randomised subspace iteration instead of a full
            decomposition.
        approximate_basis_iters: at least 0; rounds of that iteration. More are more accurate.
        approximate_basis_seed: draws the random vector that sd-mecha 1 drew for that seed; without one, a
            fixed set of more vectors is used, which is more accurate.

    Use when: to see what a LoKr of that ratio can express, or as a strong denoiser of structured deltas.
    Cost: whole tensor; a rearranged copy, and its leading singular vectors. With a `cache`, the factors are
    kept and reused.
    Source: Van Loan & Pitsianis 1993, "Approximation with Kronecker products".

    >>> a = torch.kron(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]]))
    >>> truncate_kronecker.__wrapped__(a).round()
    tensor([[1., 2.],
            [3., 6.]])
    """
    check_range("truncate_kronecker", "kronecker_ratio", kronecker_ratio, 0, 1)
    check_range("truncate_kronecker", "approximate_basis_iters", approximate_basis_iters, 0)
    if a.dim() < 2 or a.numel() == 0 or a.is_meta:
        return a.clone()
    rows, columns = factor_shape(a.shape[0], a.shape[1], math.prod(a.shape[2:]), kronecker_ratio)
    if rows * columns in (1, a.numel()):  # one factor is a number
        return a.clone()
    b, c = kronecker_factors(
        as_matrix(a),
        (rows, columns),
        use_approximate_basis,
        approximate_basis_iters,
        approximate_basis_seed,
        cache_entry(kwargs),
    )
    return torch.kron(b, c).to(a.dtype).reshape(a.shape)


@lru_cache(maxsize=1024)
def factor_shape(rows: int, columns: int, kernel: int, ratio: float) -> tuple[int, int]:
    """The shape of the first factor of a tensor of `rows x columns x kernel` entries.

    Of all shapes that divide rows and columns, the one whose number of entries is nearest to `total ** ratio`
    in proportion; among those the most nearly square one.

    >>> factor_shape(24, 40, 1, 0.5), factor_shape(24, 40, 1, 0.75)
    ((6, 5), (8, 20))
    """
    target = ratio * math.log(rows * columns * kernel)

    def distance(shape: tuple[int, int]) -> tuple[float, int]:
        return abs(math.log(shape[0] * shape[1]) - target), abs(shape[0] - shape[1])

    return min(itertools.product(_divisors(rows), _divisors(columns)), key=distance)


def kronecker_factors(
    a: Tensor, shape: tuple[int, int], approximate: bool, iters: int, seed: int | None, kept: MutableMapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The two matrices, the first of that shape, whose Kronecker product is nearest to the matrix `a`.

    Args:
        a: a matrix.
        shape: of the first factor; it divides that of `a`.
        approximate, iters, seed: whether and how to use `svd_lowrank`.
        kept: factors found earlier are taken from here, and new ones are put here.
    """
    (rows, columns), (inner_rows, inner_columns) = shape, (a.shape[0] // shape[0], a.shape[1] // shape[1])
    kind = {
        "kron_dims": (rows, inner_rows, columns, inner_columns),
        "iters": iters if approximate else None,
        "seed": seed if approximate else None,
    }
    if "w1" not in kept or any(kept.get(name) != value for name, value in kind.items()):
        blocks = a.reshape(rows, inner_rows, columns, inner_columns).transpose(1, 2)
        blocks = blocks.reshape(rows * columns, inner_rows * inner_columns)
        u, s, vh = svd_lowrank(blocks, 1, iters, seed) if approximate else thin_svd(blocks)
        root = s[0].sqrt()
        kept.clear()
        kept.update(kind)
        kept["w1"] = (u[:, 0] * root).reshape(shape)
        kept["w2"] = (vh[0] * root).reshape(inner_rows, inner_columns)
    return kept["w1"].to(a), kept["w2"].to(a)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
