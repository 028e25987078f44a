"""Averages, differences and sums: the arithmetic that most recipes are made of. All elementwise, one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_some, finite_number, keep_ends, known_number, promoted
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method


@merge_method(tiling="elementwise")
def weighted_sum(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    alpha: Parameter(Tensor) = 0.5,
) -> Return(Tensor):
    """Interpolate two models linearly: the plain merge.

    Formula: `(1 - alpha) * a + alpha * b`; exactly `a` at alpha 0 and exactly `b` at alpha 1.

    Args:
        a: the model at alpha 0; weights or deltas, the same kind as `b`.
        b: the model at alpha 1.
        alpha: usually in [0, 1]; any other number extrapolates. A number, a dict per key or block, or a param
            model.

    Use when: two fine-tunes of one base should be blended; the first thing to try.
    Cost: elementwise, one pass.
    Source: Stochastic weight averaging, arXiv 1803.05407; model soups, arXiv 2203.05482; WiSE-FT, arXiv
    2109.01903.

    >>> weighted_sum.__wrapped__(torch.tensor([0.0, 4.0]), torch.tensor([8.0, 8.0]), torch.tensor(0.25))
    tensor([2., 5.])
    """
    a, b = promoted(a, b)
    match known_number(alpha):  # inf and NaN are let through, as in sd-mecha 1
        case 0.0:
            return a.clone()
        case 1.0:
            return b.clone()
        case None:
            weight = alpha.to(a)
            return keep_ends(weight, a, b, torch.lerp(a, b, weight))
        case number:
            return torch.lerp(a, b, number)


@merge_method(tiling="elementwise")
def n_average(*models: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
    """Average any number of models with equal weights: the uniform soup.

    Formula: `(m1 + ... + mn) / n`, as a running mean in float32 or better, so that memory does not grow with
    n.

    Args:
        models: one or more models, all weights or all deltas.

    Use when: many fine-tunes of one base, or checkpoints of one run, should be pooled.
    Cost: elementwise, one pass; one model is read at a time.
    Source: model soups, arXiv 2203.05482.

    >>> n_average.__wrapped__({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([3.0, 5.0])}, key="w")
    tensor([1.5000, 3.0000])
    """
    check_some("n_average", models)
    key = kwargs["key"]
    first = models[0][key]
    dtype, wide = first.dtype, torch.promote_types(first.dtype, torch.float32)
    mean = first.to(wide, copy=True)
    for count, model in enumerate(models[1:], start=2):
        value = model[key]
        if value.dtype != dtype:
            dtype = torch.promote_types(dtype, value.dtype)
            wide = torch.promote_types(dtype, torch.float32)
            mean = mean.to(wide)
        # lerp rather than a sum divided at the end: the mean of equal values is that value, bit for bit
        mean.lerp_(value.to(wide), 1 / count)
    return mean.to(dtype)


@merge_method(tiling="elementwise")
def add_difference(
    a: Parameter(Tensor),
    b: Parameter(Tensor, "delta"),
    alpha: Parameter(Tensor) = 1.0,
) -> Return(Tensor):
    """Add a difference of models to a model: task arithmetic.

    Formula: `a + alpha * b`; exactly `a` at alpha 0. The operator `+` between recipe nodes is this method at alpha 1.

    Args:
        a: what is added to; weights, or another delta.
        b: a delta, for instance `fine_tune - base`.
        alpha: usually in [-1, 1.5]; a negative one removes what the delta teaches.

    Use when: a skill should be transplanted (`a + (tuned - base)`), or several deltas stacked on one base.
    Cost: elementwise, one pass.
    Source: Task arithmetic, arXiv 2212.04089.

    >>> add_difference.__wrapped__(torch.tensor([1.0, 2.0]), torch.tensor([4.0, -2.0]), torch.tensor(0.5))
    tensor([3., 1.])
    """
    a, b = promoted(a, b)
    if finite_number("add_difference", "alpha", alpha) == 0:
        return a.clone()  # a sum would change the sign of zeros, and b may hold inf
    return torch.addcmul(a, b, alpha.to(a))


add_difference.sum_of = ("a", "b", "alpha")


@merge_method(tiling="elementwise")
def subtract(
    a: Parameter(Tensor, "weight"),
    b: Parameter(Tensor, "weight"),
) -> Return(Tensor, "delta"):
    """Take the difference of two models: what turns `b` into `a`.

    Formula: `a - b`. The operator `-` between recipe nodes is this method.

    Args:
        a: weights, usually a fine-tune.
        b: weights, usually its base.

    Use when: a method asks for deltas (task vectors).
    Cost: elementwise, one pass.
    Source: Task arithmetic, arXiv 2212.04089.

    >>> subtract.__wrapped__(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0]))
    tensor([ 2., -3.])
    """
    return torch.sub(a, b)


@merge_method(tiling="elementwise")
def scale(
    a: Parameter(Tensor, "delta"),
    alpha: Parameter(Tensor) = 1.0,
) -> Return(Tensor, "delta"):
    """Multiply a delta by a number.

    Formula: `alpha * a`. The operator `*` between a recipe node and a number is this method.

    Args:
        a: a delta.
        alpha: any number; negative ones reverse the delta.

    Use when: a delta should act more or less strongly, before it is combined with others.
    Cost: elementwise, one pass.
    Source: Task arithmetic, arXiv 2212.04089.

    >>> scale.__wrapped__(torch.tensor([1.0, -2.0]), torch.tensor(0.5))
    tensor([ 0.5000, -1.0000])
    """
    finite_number("scale", "alpha", alpha)
    return torch.mul(a, alpha.to(a))
