"""What one worker keeps for itself: the buffer it reads into, and on a GPU a stream and pinned memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sd_mecha.planning.program import Load
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import Reader

_SUMMABLE = (torch.float32, torch.float64)


class Lane:
    """Reads ranges of tensors on the CPU.

    Bytes that need a cast are read into one buffer that is used again and again; the cast makes a new tensor, which
    the allocator serves from memory that the previous tile has just given back.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._view = memoryview(b"")

    def read(self, reader: Reader, step: Load, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a tensor, flat, as the dtype that the step casts to; the caller owns it."""
        stored, dtype = step.stored.dtype, step.dtype
        size = stored.itemsize
        if stored == dtype:
            out = torch.empty(stop - start, dtype=dtype)
            reader.read_into(name, start * size, byte_view(out))
            return out
        nbytes = (stop - start) * size
        self._reserve(nbytes)
        reader.read_into(name, start * size, self._view[:nbytes])
        return self._raw[:nbytes].view(stored).to(dtype)

    def bytes_of(self, tensor: Tensor, dtype: torch.dtype) -> memoryview:
        """A flat result in the output dtype, as bytes; they are good until the next call."""
        return byte_view(tensor.to(self.device, dtype).contiguous())

    def synchronize(self) -> None:
        """Wait until what this worker has asked for is done, so that other workers may build on it."""

    def close(self) -> None:
        """Leave the thread as it was."""

    def _reserve(self, nbytes: int) -> None:
        if nbytes > self._raw.numel():
            self._raw = torch.empty(nbytes, dtype=torch.uint8)
            self._view = byte_view(self._raw)


class CudaLane(Lane):
    """Reads into pinned memory, copies and casts on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._before = torch.cuda.current_device(), torch.cuda.current_stream(device)
        torch.cuda.set_device(device)
        torch.cuda.set_stream(self.stream)

    def read(self, reader: Reader, step: Load, name: str, start: int, stop: int) -> Tensor:
        nbytes = (stop - start) * step.stored.dtype.itemsize
        self._reserve(nbytes)
        reader.read_into(name, start * step.stored.dtype.itemsize, self._view[:nbytes])
        on_device = self._raw[:nbytes].view(step.stored.dtype).to(self.device, non_blocking=True)
        out = on_device.to(step.dtype)
        self.stream.synchronize()  # the pinned buffer is about to be read into again
        return out

    def bytes_of(self, tensor: Tensor, dtype: torch.dtype) -> memoryview:
        narrow = tensor.to(dtype).contiguous()
        self._reserve_out(narrow)
        self._out[: narrow.nbytes].view(dtype).copy_(narrow.reshape(-1), non_blocking=True)
        self.stream.synchronize()
        return self._out_view[: narrow.nbytes]

    def synchronize(self) -> None:
        self.stream.synchronize()

    def close(self) -> None:
        self.stream.synchronize()
        device, stream = self._before
        torch.cuda.set_stream(stream)
        torch.cuda.set_device(device)

    def _reserve(self, nbytes: int) -> None:
        if nbytes > self._raw.numel():
            self._raw = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self._view = byte_view(self._raw)

    _out: Tensor = torch.empty(0, dtype=torch.uint8)
    _out_view: memoryview = memoryview(b"")

    def _reserve_out(self, tensor: Tensor) -> None:
        if tensor.nbytes > self._out.numel():
            self._out = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
            self._out_view = byte_view(self._out)


def numbered(device: torch.device | None) -> torch.device | None:
    """The device with its number: "cuda" is the one that the calling thread uses, which other threads cannot know."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def settle() -> None:
    """Wait for the GPU, if this thread uses one, before other threads see what it has made."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().synchronize()


def make_lane(device: torch.device | None) -> Lane:
    return CudaLane(device) if device is not None and device.type == "cuda" else Lane()


def is_finite(x: Tensor) -> bool:
    """Whether all elements are finite. One sum answers it, except where that overflows."""
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.dtype not in _SUMMABLE:
        x = x.float()
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def stays_finite(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether all elements are finite after a cast to `dtype`."""
    if x.numel() == 0 or not (x.is_floating_point() or x.is_complex()):
        return True
    if dtype.is_complex or x.is_complex():
        return is_finite(x)
    if not dtype.is_floating_point:
        return is_finite(x)
    if x.dtype in _SUMMABLE:
        low, high = torch.aminmax(x)
        limit = torch.finfo(dtype).max
        if -limit <= low.item() and high.item() <= limit:
            return True
    return is_finite(x.to(dtype))
