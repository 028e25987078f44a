"""IA3: rows or columns of a weight are scaled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_mecha.extensions.adapters import AdapterKind, Shape, register_adapter


def ia3_delta(base: Tensor, factors: Tensor, on_inputs: Tensor) -> Tensor:
    """Return the change of a weight.

    Args:
        base: the weight.
        factors: how much each row or column grows, relative to what it is.
        on_inputs: a scalar that is not 0 where they are of columns, that is of input channels.

    >>> ia3_delta(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]), torch.tensor(0))
    tensor([[0.5000, 1.0000]])
    """
    rows, columns = base.shape[0], base.shape[1]
    if rows != columns:  # the number of factors tells; where both are equal, the stored mark does
        return base * _along(factors, base.dim(), int(factors.numel() == columns))
    first, second = (base * _along(factors, base.dim(), axis) for axis in (0, 1))
    return torch.where(on_inputs.reshape(()) != 0, second, first)


def _along(factors: Tensor, dims: int, axis: int) -> Tensor:
    return factors.reshape([-1 if dim == axis else 1 for dim in range(dims)])


def _delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    assert base is not None
    return ia3_delta(base, parts["plain_weight"], parts["on_input"])


def _peft_delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    """What PEFT stores is the factor itself, in a shape that the weight can be multiplied by."""
    assert base is not None
    factors = parts["ia3_l"]
    return base * (factors.reshape([*factors.shape, *[1] * (base.dim() - factors.dim())]) - 1)


def _peft_bias_delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    """Factors of rows are of what the layer returns, so of its bias as well; those of columns leave it alone."""
    assert base is not None
    factors = parts["ia3_l"]
    if factors.dim() > 1 and factors.shape[0] != base.shape[0]:
        return torch.zeros_like(base)
    return base * (factors.reshape(-1) - 1)


IA3 = register_adapter(
    AdapterKind(
        "ia3",
        {"common": {"weight": "plain_weight", "on_input": "on_input"}},
        (frozenset({"plain_weight", "on_input"}),),
        _delta,
        base_for=frozenset({"on_input"}),
    )
)

PEFT_IA3 = register_adapter(
    AdapterKind(
        "peft_ia3",
        {"common": {"ia3_l": "ia3_l", "ia3_l.*": "ia3_l"}},
        (frozenset({"ia3_l"}),),
        _peft_delta,
        base_for=frozenset({"ia3_l"}),
    )
)

PEFT_IA3_BIAS = register_adapter(
    AdapterKind(
        "peft_ia3_bias",
        PEFT_IA3.spellings,
        PEFT_IA3.needs,
        _peft_bias_delta,
        base_for=PEFT_IA3.base_for,
        parameter="bias",
        optional=True,
    )
)
