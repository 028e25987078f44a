"""Small questions that several method families ask of their tensors.

Methods see tiles: flat ranges of a tensor, or scalars, on any device, and on torch's meta device while
planning. So nothing here looks at a value unless it lies on the CPU and is one number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype; those that have it already are passed through, not copied."""
    dtype = tensors[0].dtype
    if all(t.dtype == dtype for t in tensors):
        return tensors
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def known_number(value: Tensor) -> float | None:
    """The value of a 0-d tensor where looking at it is free: on the CPU. None for everything else."""
    if value.dim() == 0 and value.device.type == "cpu":
        return float(value)
    return None


def keep_ends(weight: Tensor, at_zero: Tensor, at_one: Tensor, between: Tensor) -> Tensor:
    """`between`, except bit for bit `at_zero` where the weight is 0 and `at_one` where it is 1."""
    return torch.where(weight == 0, at_zero, torch.where(weight == 1, at_one, between))


def quotient(dividend: Tensor, divisor: Tensor) -> Tensor:
    """`dividend / divisor`, and 0 where the divisor is 0."""
    return torch.where(divisor == 0, 0.0, dividend / divisor)
