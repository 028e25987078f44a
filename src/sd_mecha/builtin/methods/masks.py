"""Strengths per element for `add_difference(a, b, c, alpha=mask)`: how much of `b - c` each weight takes."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import finite_number, promoted, quotient
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method


@merge_method(tiling="elementwise")
def train_difference_mask(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    c: Parameter(Tensor),
    alpha: Parameter(Tensor) = 1.0,
) -> Return(Tensor, "param"):
    """Weigh a difference as if it had been trained into `a`: little where `a` already agrees with `b`.

    Formula: `1.8 * alpha * |a - b| / (|a - b| + |b - c|)`; 0 where all three agree.

    Args:
        a: the model that will receive the difference.
        b: the model the difference leads to.
        c: the model it starts from; a, b and c are of one kind, usually weights.
        alpha: usually in [0, 1]; scales the whole mask.

    Use when: `add_difference(a, b, c)` over-shoots because `a` was already trained on similar data.
    Cost: elementwise, one pass.
    Source: "train difference" of the image-model merging community.

    >>> a, b, c = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
    >>> train_difference_mask.__wrapped__(a, b, c, torch.tensor(1.0))
    tensor([0.9000, 0.0000])
    """
    finite_number("train_difference_mask", "alpha", alpha)
    a, b, c = promoted(a, b, c)
    change = torch.abs(a - b)
    return quotient(change, change + torch.abs(b - c)).mul_(1.8).mul_(alpha.to(a))


@merge_method(tiling="elementwise")
def add_opposite_mask(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    c: Parameter(Tensor),
    alpha: Parameter(Tensor) = 1.0,
) -> Return(Tensor, "param"):
    """Weigh a difference by how far `a` is from `b`: up to twice where they lie on opposite sides of `c`.

    Formula: `alpha * |a - b| / max(|a - c|, |b - c|)`, between 0 and 2 at alpha 1; 0 where all three agree.

    Args:
        a: the model that will receive the difference.
        b: the model the difference leads to.
        c: the model it starts from; a, b and c are of one kind, usually weights.
        alpha: usually in [0, 1]; scales the whole mask.

    Use when: `a` and `b` pull in opposite directions from `c` and the pull of `b` should win.
    Cost: elementwise, one pass.
    Source: "add opposite" of the image-model merging community.

    >>> a, b, c = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    >>> add_opposite_mask.__wrapped__(a, b, c, torch.tensor(1.0))
    tensor([0., 2.])
    """
    finite_number("add_opposite_mask", "alpha", alpha)
    a, b, c = promoted(a, b, c)
    reach = torch.maximum(torch.abs(a - c), torch.abs(b - c))
    return quotient(torch.abs(a - b), reach).mul_(alpha.to(a))


@merge_method(tiling="elementwise")
def add_strict_opposite_mask(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    c: Parameter(Tensor),
    alpha: Parameter(Tensor) = 1.0,
) -> Return(Tensor, "param"):
    """Let a difference through only where `a` and `b` lie on opposite sides of `c`.

    Formula: `2 * alpha * max(0, -(a - c) (b - c)) / max(|a - c|, |b - c|) ** 2`, between 0 and 2 at alpha 1.

    Args:
        a: the model that will receive the difference.
        b: the model the difference leads to.
        c: the model it starts from; a, b and c are of one kind, usually weights.
        alpha: usually in [0, 1]; scales the whole mask.

    Use when: as `add_opposite_mask`, but weights on which `a` and `b` agree must not move.
    Cost: elementwise, one pass.
    Source: "add strict opposite" of the image-model merging community.

    >>> a, b, c = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.0])
    >>> add_strict_opposite_mask.__wrapped__(a, b, c, torch.tensor(1.0))
    tensor([0., 2.])
    """
    finite_number("add_strict_opposite_mask", "alpha", alpha)
    a, b, c = promoted(a, b, c)
    from_a, from_b = a - c, b - c
    reach = torch.maximum(torch.abs(from_a), torch.abs(from_b))
    # each factor is divided on its own: the square of a small reach would underflow
    opposition = quotient(from_a, reach) * quotient(from_b, reach)
    return opposition.neg_().clamp_(min=0).mul_(2.0).mul_(alpha.to(a))
