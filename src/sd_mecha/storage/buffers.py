"""Tensors seen as plain bytes, so that files can be read into them and written from them without a copy."""

from __future__ import annotations

import torch


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
