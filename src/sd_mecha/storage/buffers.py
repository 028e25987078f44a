"""Tensors seen as plain bytes, so that files can be read into them and written from them without a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

_PIECE = 1 << 16  # elements


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype as writable bytes; it keeps that memory alive.

    Raises:
        ValueError: the tensor has no such memory (another device, strides, a pending conjugation).
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        raise ValueError("only a contiguous tensor on the CPU has a view as bytes")
    # Not reshape(-1): a contiguous tensor of one element may have any stride, which view(uint8) refuses.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    array = flat.view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # numpy arrays are buffers, also before Python 3.12


def fill(target: memoryview, start: int, itemsize: int, make: Callable[[int, int], torch.Tensor]) -> None:
    """Fill a flat view with the bytes from `start` on of a tensor that is made a few elements at a time.

    Args:
        target: what is filled.
        start: its first byte within the tensor.
        itemsize: bytes of an element.
        make: (first, last) -> those elements, contiguous.
    """
    end = start + len(target)
    for first in range(start // itemsize, -(-end // itemsize), _PIECE):
        last = min(first + _PIECE, -(-end // itemsize))
        made = byte_view(make(first, last))
        begin, stop = max(start, first * itemsize), min(end, last * itemsize)
        target[begin - start : stop - start] = made[begin - first * itemsize : stop - first * itemsize]
