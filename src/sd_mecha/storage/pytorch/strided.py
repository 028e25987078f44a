"""Where the elements of a tensor lie when they do not lie one after the other, and how to collect them by range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_DIMS = 64
_MAX_BYTES = 2**63 - 1
_NEAR = 16 * 2**10  # bytes that are read in one piece, whatever part of them is wanted
_DENSE = 8  # a piece is worth reading if one element in so many is wanted ...
_LARGEST = 4 * 2**20  # ... and it has no more bytes than this
_MAX_OVERLAPPING = 2**20  # elements of which each may need a read of its own, however few bytes the file has

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that elements of a size are copied as: torch moves some dtypes as bits only."""


class Strided(NamedTuple):
    """A tensor within a flat row of elements, all counted in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def reach(self) -> int:
        """How many elements there are from the first to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow one another."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    @property
    def overlaps(self) -> bool:
        """Whether elements may share their place other than by being the same one along a whole dimension."""
        reach = 1
        steps = zip(self.strides, self.shape, strict=True)
        for stride, size in sorted((stride, size) for stride, size in steps if stride and size > 1):
            if stride < reach:
                return True
            reach += (size - 1) * stride
        return False

    def part(self, starts: tuple[int, ...], sizes: tuple[int, ...]) -> Strided:
        """A box within it."""
        moved = sum(start * stride for start, stride in zip(starts, self.strides, strict=True))
        return Strided(self.offset + moved, sizes, self.strides)


def check_strided(offset: object, shape: object, strides: object, itemsize: int) -> Strided:
    """A view from untrusted numbers.

    Raises:
        ValueError: they are no view that torch could make.
    """
    for what, numbers in (("shape", shape), ("strides", strides)):
        if type(numbers) is not tuple or len(numbers) > _MAX_DIMS:
            raise ValueError(f"its {what} is no tuple of at most {_MAX_DIMS} numbers")
        for number in numbers:
            if type(number) is not int or not 0 <= number <= _MAX_BYTES:
                raise ValueError(f"its {what} holds other than whole numbers from 0 to {_MAX_BYTES}")
    assert type(shape) is tuple
    assert type(strides) is tuple
    if type(offset) is not int or offset < 0:
        raise ValueError("its offset is no whole number from 0 on")
    if len(shape) != len(strides):
        raise ValueError(f"it has {len(shape)} dimensions but {len(strides)} strides")
    extent = itemsize
    for size in shape:
        extent *= size or 1
        if extent > _MAX_BYTES:
            raise ValueError(f"its shape means more than {_MAX_BYTES} bytes")
    view = Strided(offset, shape, strides)
    if (offset + view.reach) * itemsize > _MAX_BYTES:
        raise ValueError(f"its offset and strides reach beyond {_MAX_BYTES} bytes")
    if view.reach * itemsize > _NEAR and math.prod(shape) > _MAX_OVERLAPPING and view.overlaps:
        raise ValueError(
            f"its {math.prod(shape)} elements overlap in {view.reach} places, so that reading them would take very "
            "long; save the tensor's .contiguous()"
        )
    return view


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements `first` to `last` of a tensor, counted row by row, as boxes in that order: starts and sizes.

    >>> list(boxes((3, 4), 2, 9))
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if first >= last:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    while first < last:
        row, within = divmod(first, inner)
        if within == 0 and last - first >= inner:
            rows = (last - first) // inner
            yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
            first += rows * inner
        else:
            end = min(last, (row + 1) * inner)
            for starts, sizes in boxes(shape[1:], within, end - row * inner):
                yield (row, *starts), (1, *sizes)
            first = end


def gather(fetch: Callable[[int, int], Tensor], view: Strided, out: Tensor) -> None:
    """Collect the elements of a view.

    Args:
        fetch: reads elements: the first and how many -> a flat tensor.
        view: which; not empty.
        out: where they go: of the view's shape.
    """
    item = out.element_size()
    span = view.reach
    if span == 1 or span * item <= _NEAR or (span <= _DENSE * out.numel() and span * item <= _LARGEST):
        out.copy_(fetch(view.offset, span).as_strided(view.shape, view.strides))
        return
    steps = [(size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)]
    dim = steps.index(max(steps))
    size = view.shape[dim]
    for start, end in ((0, size // 2), (size // 2, size)):
        shape = (*view.shape[:dim], end - start, *view.shape[dim + 1 :])
        part = Strided(view.offset + start * view.strides[dim], shape, view.strides)
        gather(fetch, part, out.narrow(dim, start, end - start))
