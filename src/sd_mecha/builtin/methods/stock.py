"""Model Stock: how much of an average to trust follows from the angles between what it averages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sd_mecha.builtin.methods.common import (
    check_choice,
    check_positive,
    check_some,
    promoted,
    shape_of,
    weighted_mean,
)
from sd_mecha.builtin.methods.gram import stock_factors
from sd_mecha.extensions.groups import GroupGram, Groups
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.reductions import Gram


@merge_method(tiling="elementwise")
def model_stock(
    *deltas: Parameter(Tensor, "delta"),
    cos_eps: Parameter(float) = 1e-6,
    filter_wise: Parameter(bool) = False,
    pairs: Parameter(str) = "all",
    bounded: Parameter(bool) = True,
    **kwargs: Any,
) -> Return(Tensor, "delta"):
    """Average deltas, and shrink the average by how much they agree.

    Formula: `t * mean(d_i)` with `t = n c / (1 + (n - 1) c)`, c the mean cosine of the deltas, all pairs of them;
    1 for equal deltas, 0 for orthogonal ones. One delta is returned as it is.

    Args:
        deltas: one or more deltas of one base; `n_model_stock` takes whole models.
        cos_eps: above 0; the least product of norms that a cosine is divided by.
        filter_wise: a factor of its own for each row (slice along the first dimension; a vector is one row) instead
            of one for the tensor.
        pairs: "all", or "adjacent" for the cosines of neighbours only, which depends on the order of the deltas.
        bounded: keep t within [0, 1]. Without it t is negative for opposed deltas, and has a pole at
            `c = -1 / (n - 1)`.

    Use when: a few fine-tunes of one base should be averaged, and there is no telling how far to go.
    Cost: two passes (the inner products of the pairs, then elementwise).
    Source: Model Stock, arXiv 2403.19522.

    >>> import sd_mecha, torch
    >>> deltas = [sd_mecha.model({"w": torch.tensor(v)}, merge_space="delta") for v in ([2.0, 0.0], [2.0, 2.0])]
    >>> recipe = sd_mecha.model_stock(*deltas)
    >>> sd_mecha.merge(recipe, strict_merge_space="delta", output_dtype=None)["w"].round(decimals=3)
    tensor([1.6570, 0.8280])
    """
    check_positive("model_stock", "cos_eps", cos_eps)
    check_choice("model_stock", "pairs", pairs, ("all", "adjacent"))
    check_some("model_stock", deltas, "delta")
    deltas = promoted(*deltas)
    count, tile = len(deltas), kwargs["tile"]
    if count == 1:
        return deltas[0].clone()
    rows = Groups.rows(shape_of(deltas[0], tile))
    if filter_wise and rows.count > 1:
        products = yield GroupGram(deltas, rows)
    else:
        products = yield Gram(deltas)
    factors = stock_factors(products, count, cos_eps, adjacent=pairs == "adjacent", bounded=bounded)
    mean = weighted_mean(deltas, [1 / count] * count)
    if factors.dim() > 0:
        factors = rows.spread(factors.to(mean), tile.start, mean.numel()).view(mean.shape)
    return mean.mul_(factors.to(mean))
