"""LoKr: a weight changes by the Kronecker product of two matrices, either of which may be a product itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_mecha.builtin.adapters.common import ALPHA, fitted, scaled
from sd_mecha.builtin.adapters.dora import decomposable
from sd_mecha.extensions.adapters import Shape, register_adapter


def lokr_delta(
    *,
    w1: Tensor | None = None,
    w1_a: Tensor | None = None,
    w1_b: Tensor | None = None,
    w2: Tensor | None = None,
    w2_a: Tensor | None = None,
    w2_b: Tensor | None = None,
    t2: Tensor | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    """Return the change of a weight.

    Args:
        w1: the first matrix; else the product of `w1_a` (rows, rank) and `w1_b` (rank, columns).
        w2: the second matrix or kernel; else the product of `w2_a` and `w2_b`, the kernel flattened into the
            columns of the latter; with `t2` (rank, rank, ...) between them, and then `w2_a` is (rank, rows).
        alpha: strength; the product is scaled by `alpha / rank`, of the rank of the first matrix, else of the
            second (training gives both the same). Where neither is a product there is no rank, and the scale is 1.

    Returns:
        A matrix, or a kernel where the second factor is one.

    >>> lokr_delta(w1=torch.tensor([[1.0, 2.0]]), w2=torch.tensor([[3.0], [4.0]]))
    tensor([[3., 6.],
            [4., 8.]])
    """
    rank = w1_b.shape[0] if w1_b is not None else w2_b.shape[0] if w2_b is not None else None
    first = _product(w1, w1_a, w1_b)
    if t2 is not None and w2 is None:
        second = torch.einsum("rs...,ro,si->oi...", t2, w2_a, w2_b)
    else:
        second = _product(w2, w2_a, w2_b)
    kernel = second.dim() - first.dim()
    delta = torch.kron(first.reshape(*first.shape, *[1] * kernel), second.contiguous())  # kron views its operands
    return delta if rank is None else scaled(delta, alpha, rank)


def _product(whole: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor:
    if whole is not None:
        return whole
    assert left is not None
    assert right is not None
    return left @ right


def _delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    named = {name.removeprefix("lokr_"): tensor for name, tensor in parts.items() if name.startswith("lokr_")}
    return fitted(lokr_delta(**named, alpha=parts.get("alpha")), shape)


_FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
)

LOKR = register_adapter(
    decomposable(
        "lokr",
        {"common": ALPHA | {part: part for part in sorted(frozenset().union(*_FIRST, *_SECOND))}},
        tuple(first | second for first in _FIRST for second in _SECOND),
        _delta,
        frozenset({"alpha"}),
    )
)
