"""Keeping a model within the range that other models span."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_finite, check_some, promoted
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method


@merge_method(tiling="elementwise")
def clamp(
    a: Parameter(Tensor),
    *bounds: Parameter(Tensor),
    stiffness: Parameter(float) = 0.0,
) -> Return(Tensor):
    """Limit each weight of a model to the range that other models span.

    Formula: `min(max(a, low), high)`, where low and high are the smallest and the largest bound at stiffness
    0, and the bounds next to their mean, from below and from above, at stiffness 1; linear in between.

    Args:
        a: the model to limit; of the same kind as the bounds.
        bounds: one or more models. One bound replaces `a`; stiffness matters from three on.
        stiffness: usually in [0, 1]; how far the range shrinks towards the middle bounds.

    Use when: an extrapolating merge should not leave the range of its inputs; `add_difference(...,
    clamp_to_ab=True)`.
    Cost: elementwise, one pass.
    Source: an operator of the image-model merging community.

    >>> a, low, high = torch.tensor([-1.0, 0.5, 9.0]), torch.zeros(3), torch.ones(3)
    >>> clamp.__wrapped__(a, low, high)
    tensor([0.0000, 0.5000, 1.0000])
    """
    check_some("clamp", bounds, "bound")
    check_finite("clamp", "stiffness", stiffness)
    a, *limits = promoted(a, *bounds)
    low = high = limits[0]
    for limit in limits[1:]:
        low, high = torch.minimum(low, limit), torch.maximum(high, limit)
    if stiffness != 0 and len(limits) > 2:
        low, high = _stiffen(low, high, limits, stiffness)
    return torch.minimum(torch.maximum(a, low), high)


def _stiffen(low: Tensor, high: Tensor, limits: list[Tensor], stiffness: float) -> tuple[Tensor, Tensor]:
    """Move both ends towards the limits nearest to the mean of all."""
    mean = limits[0].clone()
    for limit in limits[1:]:
        mean += limit
    mean /= len(limits)
    below, above = low, high
    for limit in limits:
        below = torch.where((limit <= mean) & (limit > below), limit, below)
        above = torch.where((limit >= mean) & (limit < above), limit, above)
    return torch.lerp(low, below, stiffness), torch.lerp(high, above, stiffness)
