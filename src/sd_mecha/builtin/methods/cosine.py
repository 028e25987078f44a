"""Weighted sums whose weight follows from how alike two models are, column by column.

A column is what one input of a layer sees: all elements at one place of the slices along the first dimension. Its
cosine is known once the whole tensor was seen, so both methods are streamed; a vector or a scalar is one column.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import keep_ends, promoted, quotient, shape_of
from sd_mecha.extensions.groups import GroupGram, GroupMax, Groups
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.reductions import Dot
from sd_mecha.extensions.tile import Tile


@merge_method(tiling="elementwise")
def add_cosine_a(
    a: Parameter(Tensor, "weight"),
    b: Parameter(Tensor, "weight"),
    alpha: Parameter(Tensor) = 1.0,
    **kwargs: Any,
) -> Return(Tensor, "weight"):
    """Take more of `b` where its columns point elsewhere than those of `a`.

    Formula: with s the cosine of a column of `a` and the same column of `b`, 0 where one is zero,
    `(1 - t) * a + t * b` for `t = 1 - clip(s - alpha, 0, 1)`.

    Args:
        a: weights; what remains where the models agree.
        b: weights, usually of the same base.
        alpha: usually in [0, 1]: the cosine up to which `b` alone counts. At 1 and above the result is `b`; below
            the cosines it moves towards `a`.

    Use when: what `b` does differently should be taken over, and what it shares with `a` left alone.
    Cost: three passes (the largest of each column, inner products of each column, then elementwise).
    Source: "cosine A" of the image-model merging community.

    >>> import sd_mecha
    >>> a, b = {"w": torch.tensor([[1.0, 1.0], [1.0, 0.0]])}, {"w": torch.tensor([[3.0, 0.0], [3.0, 5.0]])}
    >>> recipe = sd_mecha.add_cosine_a(sd_mecha.model(a), sd_mecha.model(b), alpha=0.0)
    >>> sd_mecha.merge(recipe, output_dtype=None)["w"]
    tensor([[1., 0.],
            [1., 5.]])
    """
    a, b = promoted(a, b)
    columns = Groups.columns(shape_of(a, kwargs["tile"]))
    cosines = yield from _cosines(a, b, columns)
    return _blend(a, b, cosines, columns, kwargs["tile"], alpha)


@merge_method(tiling="elementwise")
def add_cosine_b(
    a: Parameter(Tensor, "weight"),
    b: Parameter(Tensor, "weight"),
    alpha: Parameter(Tensor) = 1.0,
    **kwargs: Any,
) -> Return(Tensor, "weight"):
    """Take more of `b` where its columns, and the tensor as a whole, point elsewhere than those of `a`.

    Formula: as `add_cosine_a`, with s the mean of the column's cosine and that of the whole tensors; `a` where one
    of the tensors is zero.

    Args:
        a: weights; what remains where the models agree.
        b: weights, usually of the same base.
        alpha: usually in [0, 1]: the similarity up to which `b` alone counts. At 1 and above the result is `b`.

    Use when: as `add_cosine_a`, but single columns should not decide alone.
    Cost: three passes (the largest of each column, inner products of each column, then elementwise).
    Source: "cosine B" of the image-model merging community.

    >>> import sd_mecha
    >>> a, b = {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, {"w": torch.tensor([[2.0, 1.0], [0.0, 0.0]])}
    >>> recipe = sd_mecha.add_cosine_b(sd_mecha.model(a), sd_mecha.model(b), alpha=0.0)
    >>> sd_mecha.merge(recipe, output_dtype=None)["w"].round(decimals=3)
    tensor([[1.1840, 0.6840],
            [0.0000, 0.3160]])
    """
    a, b = promoted(a, b)
    columns = Groups.columns(shape_of(a, kwargs["tile"]))
    aa, bb, ab = yield Dot(a, a), Dot(b, b), Dot(a, b)
    cosines = yield from _cosines(a, b, columns)
    overall = torch.clamp(quotient(ab, torch.sqrt(aa) * torch.sqrt(bb)), -1.0, 1.0)
    result = _blend(a, b, (cosines + overall) / 2, columns, kwargs["tile"], alpha)
    return torch.where((aa == 0) | (bb == 0), a, result)


def _cosines(a: Tensor, b: Tensor, columns: Groups) -> Generator[Any, Any, Tensor]:
    """The cosine of each column; of each element of the tile where a column is one element."""
    if columns.size <= 1:
        return torch.sign(a).mul_(torch.sign(b)).reshape(-1).to(torch.float64)
    bounds = yield GroupMax(a, columns), GroupMax(b, columns)
    aa, ab, bb = (yield GroupGram((a, b), bounds, columns)).unbind()
    return torch.clamp(quotient(ab, torch.sqrt(aa) * torch.sqrt(bb)), -1.0, 1.0)


def _blend(a: Tensor, b: Tensor, similarity: Tensor, columns: Groups, tile: Tile, alpha: Tensor) -> Tensor:
    """The weighted sum of a tile, given the similarity of each of its columns."""
    single, limit = columns.size <= 1, alpha.to(similarity)
    if alpha.dim() == 0:  # the weights are as many as the columns, and spread over the elements as such
        weight = (1 - torch.clamp(similarity - limit, 0, 1)).to(a.dtype)
        weight = weight if single else columns.spread(weight, tile.start, a.numel())
        weight = weight.view(a.shape)
    else:
        spread = similarity if single else columns.spread(similarity, tile.start, a.numel())
        weight = (1 - torch.clamp(spread.view(a.shape) - limit, 0, 1)).to(a.dtype)
    return keep_ends(weight, a, b, torch.lerp(a, b, weight))
