"""LoHa: a weight changes by the elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_mecha.builtin.adapters.common import ALPHA, fitted, scaled
from sd_mecha.builtin.adapters.dora import decomposable
from sd_mecha.extensions.adapters import Shape, register_adapter


def loha_delta(
    *,
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
    t1: Tensor | None = None,
    t2: Tensor | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    """Return the change of a weight.

    Args:
        w1_a, w2_a: (outputs, rank); with `t1` and `t2` (rank, outputs).
        w1_b, w2_b: (rank, inputs), the kernel flattened into the columns; with `t1` and `t2` (rank, inputs).
        t1, t2: (rank, rank, ...) with the kernel behind.
        alpha: strength; the product is scaled by `alpha / rank`. Without one the scale is 1.

    >>> half = torch.tensor([[0.5]])
    >>> loha_delta(w1_a=half, w1_b=half, w2_a=half, w2_b=torch.tensor([[2.0]]))
    tensor([[0.2500]])
    """
    product = _matrix(w1_a, w1_b, t1) * _matrix(w2_a, w2_b, t2)
    return scaled(product, alpha, w1_b.shape[0])


def _matrix(left: Tensor, right: Tensor, core: Tensor | None) -> Tensor:
    return left @ right if core is None else torch.einsum("rs...,ro,si->oi...", core, left, right)


def _delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    factors = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    named = {name: parts[f"hada_{name}"] for name in factors if f"hada_{name}" in parts}
    return fitted(loha_delta(**named, alpha=parts.get("alpha")), shape)


_PAIRS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_CORES = frozenset({"hada_t1", "hada_t2"})

LOHA = register_adapter(
    decomposable(
        "loha",
        {"common": ALPHA | {part: part for part in sorted(_PAIRS | _CORES)}},
        (_PAIRS | _CORES, _PAIRS),
        _delta,
        frozenset({"alpha"}),
        rows={"hada_w1_a": 0, "hada_w2_a": 0},
        whole_for=_CORES,
    )
)
