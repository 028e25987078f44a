"""Weighted sums whose weight follows from how alike two models are, column by column.

A column is what one input of a layer sees: all elements at one place of the slices along the first dimension. Its
cosine is known once the whole tensor was seen, so both methods are streamed; a vector or a scalar is one column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import finite_number, keep_ends, promoted, quotient, shape_of
from sd_mecha.extensions.groups import GroupGram, Groups
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
    Cost: two passes (inner products of each column, then elementwise).
    Source: "cosine A" of the image-model merging community.

    >>> import sd_mecha
    >>> a, b = {"w": torch.tensor([[1.0, 1.0], [1.0, 0.0]])}, {"w": torch.tensor([[3.0, 0.0], [3.0, 5.0]])}
    >>> recipe = sd_mecha.add_cosine_a(sd_mecha.model(a), sd_mecha.model(b), alpha=0.0)
    >>> sd_mecha.merge(recipe, output_dtype=None)["w"]
    tensor([[1., 0.],
            [1., 5.]])
    """
    finite_number("add_cosine_a", "alpha", alpha)
    a, b = promoted(a, b)
    columns = Groups.columns(shape_of(a, kwargs["tile"]))
    similarity = _signs(a, b) if columns.size <= 1 else (yield GroupGram((a, b), columns, _cosines))
    return _blend(a, b, similarity, columns, kwargs["tile"], alpha)


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
    Cost: two passes (inner products of each column, then elementwise).
    Source: "cosine B" of the image-model merging community.

    >>> import sd_mecha
    >>> a, b = {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, {"w": torch.tensor([[2.0, 1.0], [0.0, 0.0]])}
    >>> recipe = sd_mecha.add_cosine_b(sd_mecha.model(a), sd_mecha.model(b), alpha=0.0)
    >>> sd_mecha.merge(recipe, output_dtype=None)["w"].round(decimals=3)
    tensor([[1.1840, 0.6840],
            [0.0000, 0.3160]])
    """
    finite_number("add_cosine_b", "alpha", alpha)
    a, b = promoted(a, b)
    columns = Groups.columns(shape_of(a, kwargs["tile"]))
    if columns.size <= 1:  # a column is an element, so there are as many answers as elements: only their sums are kept
        products = yield Dot(a, a), Dot(a, b), Dot(b, b)
        similarity = _with_overall(_signs(a, b), torch.stack(products))
    else:
        similarity = yield GroupGram((a, b), columns, lambda p: _with_overall(_cosines(p), p.sum(1)))
    return _blend(a, b, similarity, columns, kwargs["tile"], alpha)


def _signs(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of each element of the tile, taken for a column."""
    return torch.sign(a).mul_(torch.sign(b)).reshape(-1).to(torch.float64)


def _cosines(products: Tensor) -> Tensor:
    """What follows from the inner products of `a` with itself, with `b`, and of `b` with itself."""
    aa, ab, bb = products.unbind()
    return torch.clamp(quotient(ab, torch.sqrt(aa) * torch.sqrt(bb)), -1.0, 1.0)


def _with_overall(cosines: Tensor, products: Tensor) -> Tensor:
    """The mean of cosines and that of the whole tensors; beyond any limit where one of the tensors is zero."""
    nothing = (products[0] == 0) | (products[2] == 0)
    return torch.where(nothing, torch.inf, (cosines + _cosines(products)) / 2)


def _blend(a: Tensor, b: Tensor, similarity: Tensor, columns: Groups, tile: Tile, alpha: Tensor) -> Tensor:
    """The weighted sum of a tile, given the similarity of each of its columns."""
    single, limit = columns.size <= 1, alpha.to(similarity)
    if alpha.dim() > 0:
        spread = similarity if single else columns.spread(similarity, tile.start, a.numel())
        return _mixed(a, b, (1 - torch.clamp(spread.view(a.shape) - limit, 0, 1)).to(a.dtype))
    weight = (1 - torch.clamp(similarity - limit, 0, 1)).to(a.dtype)
    if single:
        return _mixed(a, b, weight.view(a.shape))
    # as many weights as columns: they are read again for each row
    result = torch.empty_like(a, memory_format=torch.contiguous_format)
    flat = a.reshape(-1), b.reshape(-1), result.view(-1)
    plain = weight.is_cpu and not bool(((weight == 0) | (weight == 1)).any())  # lerp alone is right
    for piece in columns.pieces(tile.start, a.numel()):
        x, y, out = (part[piece.start : piece.stop].view(piece.shape) for part in flat)
        torch.lerp(x, y, weight[piece.groups], out=out)
        if not plain:
            out.copy_(keep_ends(weight[piece.groups], x, y, out))
    return result


def _mixed(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum, bit for bit one of the two where the weight is 0 or 1."""
    return keep_ends(weight, a, b, torch.lerp(a, b, weight))
