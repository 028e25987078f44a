"""Interpolation in the logarithm: products and quotients of weights, where zero is a fixed point.

A weight is its magnitude and a half turn if it is negative. Powers act on both, as they do on complex numbers, and
the real part is the result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import finite_number, keep_ends, promoted
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method


@merge_method(tiling="elementwise")
def geometric_sum(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    alpha: Parameter(Tensor) = 0.5,
) -> Return(Tensor):
    """Interpolate two models geometrically: a weight stays only if both models have it.

    Formula: the real part of `a ** (1 - alpha) * b ** alpha` over the complex numbers, that is
    `|a| ** (1 - alpha) * |b| ** alpha`, times `cos(pi * alpha)` or `-cos(pi * alpha)` where the signs differ and the
    sign of both elsewhere; exactly `a` at alpha 0 and exactly `b` at alpha 1.

    Args:
        a: the model at alpha 0; weights or, more often, deltas, the same kind as `b`.
        b: the model at alpha 1.
        alpha: usually in [0, 1]; beyond, small weights are divided by and grow without bound.

    Use when: only what two deltas share should remain, like a logical AND.
    Cost: elementwise, one pass; a power of float32 or better.
    Source: an operator of the image-model merging community; the weighted geometric mean.

    >>> geometric_sum.__wrapped__(torch.tensor([4.0, -4.0, 4.0]), torch.tensor([9.0, -9.0, 0.0]), torch.tensor(0.5))
    tensor([ 6., -6.,  0.])
    """
    finite_number("geometric_sum", "alpha", alpha)
    a, b = promoted(a, b)
    wide = torch.promote_types(a.dtype, torch.float32)
    weight, x, y = alpha.to(a.device, wide), a.to(wide), b.to(wide)
    magnitude = torch.exp((1 - weight) * torch.log(x.abs()) + weight * torch.log(y.abs()))
    turn_a, turn_b = _half_turns(x), _half_turns(y)
    between = torch.cos(torch.lerp(turn_a, turn_b, weight).mul_(math.pi)).mul_(magnitude)
    return keep_ends(weight, a, b, between.to(a.dtype))


@merge_method(tiling="elementwise")
def multiply_quotient(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    c: Parameter(Tensor),
    alpha: Parameter(Tensor) = 1.0,
) -> Return(Tensor):
    """Multiply a model by how `b` scaled `c`, where `a` itself was scaled the other way.

    Formula: with `x = log|a / c|`, `y = log|b / c|` and `e = alpha * max(0, -x y) / max(|x|, |y|) ** 2`, the real
    part of `a * (b / c) ** e`: times `|b / c| ** e`, and times `cos(pi * e)` where b and c have opposite signs.
    It is `a` where `a` and `b` lie on one side of `c`, or where a weight is 0.

    Args:
        a: the model that is changed.
        b: the model the change leads to.
        c: the model it starts from; a, b and c are of one kind, usually weights.
        alpha: usually in [0, 1]; exactly `a` at 0.

    Use when: a difference should act in proportion to each weight, and only undo what `a` did against `b`;
    `add_strict_opposite_mask` is the same idea for sums.
    Cost: elementwise, one pass; logarithms in float32 or better.
    Source: an operator of the image-model merging community.

    >>> a, b, c = torch.tensor([8.0, 8.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0])
    >>> multiply_quotient.__wrapped__(a, b, c, torch.tensor(1.0)).round(decimals=3)
    tensor([6.3500, 8.0000])
    """
    finite_number("multiply_quotient", "alpha", alpha)
    a, b, c = promoted(a, b, c)
    wide = torch.promote_types(a.dtype, torch.float32)
    x, y, z = a.to(wide), b.to(wide), c.to(wide)
    log_c = torch.log(z.abs())
    log_a, log_b = torch.log(x.abs()) - log_c, torch.log(y.abs()) - log_c
    reach = torch.maximum(log_a.abs(), log_b.abs())
    # each factor is divided on its own: the square of a small reach would underflow
    opposition = -(log_a / reach) * (log_b / reach)
    power = alpha.to(a.device, wide) * opposition
    turn = torch.cos((_half_turns(y) - _half_turns(z)).mul_(math.pi) * power)
    changed = torch.exp(power * log_b).mul_(turn).mul_(x)
    return torch.where((opposition > 0) & (power != 0), changed.to(a.dtype), a)  # false for NaN, that is for zeros


def _half_turns(x: Tensor) -> Tensor:
    return (x < 0).to(x.dtype)
