"""What the families of adapters share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

ALPHA = {"alpha": "alpha"}
"""How every program writes the strength of a module."""


def scaled(delta: Tensor, alpha: Tensor | None, rank: int) -> Tensor:
    """Return the delta times `alpha / rank`, or as it is without an alpha.

    Training divides by the rank so that one alpha is about as strong at every rank.
    """
    if alpha is None or delta.is_meta:  # only the shape is asked for, and torch would load its compiler for more
        return delta
    return delta * (alpha.reshape(()) / rank)


def fitted(delta: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the delta with the dimensions of the weight that it belongs to.

    Factors may be matrices where the weight is a kernel, and the reverse. The sizes follow the factors where the
    weight of another model has more or fewer channels.

    Args:
        delta: what the factors make.
        shape: shape of the weight in a usual model.
    """
    if delta.numel() == math.prod(shape):
        return delta.reshape(tuple(shape))
    while delta.dim() > max(len(shape), 1) and delta.shape[-1] == 1:
        delta = delta.squeeze(-1)
    return delta.reshape(*delta.shape, *[1] * (len(shape) - delta.dim()))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices; on the meta device without asking torch, which would load its compiler.

    Raises:
        RuntimeError: they do not fit each other.
    """
    if not left.is_meta:
        return left @ right
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0] or left.dtype != right.dtype:
        shown = " and ".join(f"{tuple(x.shape)} ({x.dtype})" for x in (left, right))
        raise RuntimeError(f"matrices of shapes {shown} cannot be multiplied")
    return left.new_empty(left.shape[0], right.shape[1])
