"""Small questions that several method families ask of their tensors.

Methods see tiles: flat ranges of a tensor, or scalars, on any device, and on torch's meta device while
planning. So nothing here looks at a value unless it lies on the CPU and is one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sd_mecha.errors import ParameterError, ShapeError
from sd_mecha.extensions.tile import Tile


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


def finite_number(method: str, name: str, value: Tensor) -> float | None:
    """`known_number` of a parameter of a method, refused where it is not finite.

    Raises:
        ParameterError: it is inf or NaN; the message names method, parameter and value.
    """
    number = known_number(value)
    if number is not None:
        check_finite(method, name, number)
    return number


def keep_ends(weight: Tensor, at_zero: Tensor, at_one: Tensor, between: Tensor) -> Tensor:
    """`between`, except bit for bit `at_zero` where the weight is 0 and `at_one` where it is 1."""
    return torch.where(weight == 0, at_zero, torch.where(weight == 1, at_one, between))


def quotient(dividend: Tensor, divisor: Tensor) -> Tensor:
    """`dividend / divisor`, and 0 where the divisor is 0."""
    return torch.where(divisor == 0, 0.0, dividend / divisor)


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of tensors of one dtype with weights of sum 1, in float32 or better; of equal tensors, bit for bit it."""
    dtype = tensors[0].dtype
    mean = tensors[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    total = weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight
        # lerp rather than a sum divided at the end: the mean of equal values is that value
        mean.lerp_(tensor.to(mean), weight / total if total else 0.0)
    return mean.to(dtype)


def shape_of(tensor: Tensor, tile: Tile) -> tuple[int, ...]:
    """The shape of what a tensor is a tile of; its own where a method sees entire tensors that broadcast."""
    return tile.shape if tensor.numel() == tile.stop - tile.start else tuple(tensor.shape)


def check_range(method: str, name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse a parameter outside [low, high].

    Raises:
        ParameterError: it is; the message names method, parameter, value and range.
    """
    if not low <= value <= high:  # true for NaN too
        allowed = f"in [{low:g}, {high:g}]" if high < math.inf else f"at least {low:g}"
        raise ParameterError(f"{method}: {name} is {value!r}; expected a number {allowed}")


def check_finite(method: str, name: str, value: float) -> None:
    """Refuse inf and NaN as a parameter.

    Raises:
        ParameterError: it is one of them; the message names method, parameter and value.
    """
    if not math.isfinite(value):
        raise ParameterError(f"{method}: {name} is {value!r}; expected a finite number")


def check_positive(method: str, name: str, value: float) -> None:
    """Refuse a parameter that is not above 0.

    Raises:
        ParameterError: it is not; the message names method, parameter, value and range.
    """
    if not value > 0:
        raise ParameterError(f"{method}: {name} is {value!r}; expected a number above 0")


def check_choice(method: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a parameter that is none of a few words.

    Raises:
        ParameterError: it is none; the message names method, parameter, value and the words.
    """
    if value not in choices:
        raise ParameterError(f"{method}: {name} is {value!r}; expected {' or '.join(map(repr, choices))}")


def check_some(method: str, inputs: Sequence[object], what: str = "model") -> None:
    """Refuse a call without any model.

    Raises:
        ParameterError: there is none.
    """
    if not inputs:
        raise ParameterError(f"{method}: got no {what}; expected at least one")


def check_one_shape(method: str, *tensors: Tensor) -> None:
    """Refuse tensors that differ in shape, which would be broadcast: for methods that see entire tensors.

    Raises:
        ShapeError: two differ; the message names method and shapes.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if any(shape != shapes[0] for shape in shapes):
        raise ShapeError(f"{method}: the shapes {' and '.join(map(str, shapes))} differ; it takes tensors of one shape")
