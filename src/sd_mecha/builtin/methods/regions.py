"""Copying a part of one model into another: a range of rows, or a range of ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_finite, check_one_shape, promoted
from sd_mecha.builtin.methods.ordering import kth_smallest, order_of, ranges, sort_in_place
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method


@merge_method(tiling="elementwise")
def tensor_sum(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    width: Parameter(float) = 0.5,
    offset: Parameter(float) = 0.0,
    **kwargs: Any,
) -> Return(Tensor):
    """Replace a range of the rows of each tensor by those of another model.

    Formula: rows `round(offset p)` to `round((offset + width) p)` of the p rows (slices along the first dimension)
    are those of `b`, going on at the first row where the range leaves the last; all others are those of `a`.
    A scalar is that of `b` if width is above 0.5.

    Args:
        a: the model to copy into; weights or deltas, the same kind as `b`.
        b: the model to copy from.
        width: the share of rows to copy, in [0, 1]; more counts as 1, and a negative one extends to the left.
        offset: where the range begins, as a share of the rows; any number, of period 1.

    Use when: two models should be spliced without averaging anything; `copy_region` applies it to differences.
    Cost: elementwise, one pass; copies bit for bit.
    Source: "tensor merge" of the image-model merging community.

    >>> import sd_mecha
    >>> a, b = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"w": torch.zeros(4)}
    >>> recipe = sd_mecha.tensor_sum(sd_mecha.model(a), sd_mecha.model(b), width=0.5, offset=0.75)
    >>> sd_mecha.merge(recipe, output_dtype=None)["w"]
    tensor([0., 2., 3., 0.])
    """
    tile = kwargs["tile"]
    rows = tile.shape[0] if tile.shape else 1
    start, stop, outside = _region("tensor_sum", width, offset, rows)
    a, b = promoted(a, b)
    if not tile.shape:
        return b.clone() if width > 0.5 else a.clone()
    row = tile.numel // max(rows, 1)
    low, high = (min(max(at * row - tile.start, 0), a.numel()) for at in (start, stop))
    around, within = (b, a) if outside else (a, b)
    result = around.flatten().clone()
    result[low:high] = within.reshape(-1)[low:high]
    return result.view(a.shape)


@merge_method
def top_k_tensor_sum(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    width: Parameter(float) = 1.0,
    offset: Parameter(float) = 0.0,
) -> Return(Tensor):
    """Rearrange the values of a tensor in the order that another model gives them, for a range of magnitudes.

    Formula: the r-th smallest value of `a` goes where `b` has its r-th smallest, for those values of `a` whose
    magnitude is between the `round(offset n)`-th and the `round((offset + width) n)`-th smallest of the n magnitudes,
    both included; everything else stays. Where offset + width exceeds 1, it is all magnitudes but those in between.

    Args:
        a: the model whose values are used; weights or deltas, the same kind as `b`.
        b: the model whose order is used.
        width: the share of magnitudes to move, in [0, 1]; more counts as 1, and a negative one extends downwards.
        offset: where the range begins, as a share of the magnitudes; any number, of period 1.

    Use when: the structure of `b` is wanted in the distribution of values of `a`.
    Cost: entire tensors, O(n log n): a rank is a fact of all elements. A value may move onto another that moves,
    and a place that is left keeps its value, so below width 1 values can occur twice.
    Source: "top-k tensor sum" of the image-model merging community.

    >>> a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 7.0, 8.0])
    >>> top_k_tensor_sum.__wrapped__(a, b)
    tensor([3., 1., 2.])
    """
    check_one_shape("top_k_tensor_sum", a, b)
    start, stop, outside = _region("top_k_tensor_sum", width, offset, a.numel())
    a, b = promoted(a, b)
    if a.is_meta:
        return torch.empty_like(a)
    values, place = a.reshape(-1), order_of(b.reshape(-1))
    ordered = sort_in_place(values.clone())
    everything = start <= 0 and stop >= len(values) and not outside
    low, high = (-1.0, -1.0) if everything else kth_smallest(ordered.abs(), start, stop)
    result = values.clone()
    for begin, end in ranges(len(values)):
        chosen, to = ordered[begin:end], place[begin:end].to(torch.int64)
        if not everything:
            magnitude = chosen.abs()
            moved = ((magnitude >= low) & (magnitude <= high)) ^ outside
            chosen, to = chosen[moved], to[moved]
        result[to] = chosen
    return result.view(a.shape)


def _region(method: str, width: float, offset: float, size: int) -> tuple[int, int, bool]:
    """The range of `size` things that is meant: its ends, and whether what lies outside of them is meant instead."""
    for name, value in (("width", width), ("offset", offset)):
        check_finite(method, name, value)
    if width < 0:
        offset, width = offset + width, -width
    width = min(width, 1.0)
    offset = math.fmod(offset if offset >= 0 else 1 + math.fmod(offset, 1.0), 1.0)
    end = offset + width
    if end > 1:
        return round((end - 1) * size), round(offset * size), True
    return round(offset * size), round(end * size), False
