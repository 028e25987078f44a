"""What a source and a destination of tensors must offer; any format that satisfies it can be merged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Shape and dtype of one tensor, as torch sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of torch elements (1 for a 0-d tensor)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class ByteSource(Protocol):
    """A file, wherever it lies, that is read by range from several threads at once."""

    @property
    def name(self) -> str:
        """What messages call it: its path or address."""

    @property
    def size(self) -> int:
        """Bytes in it when it was opened."""

    @property
    def fingerprint(self) -> str:
        """What tells this content from another that stood in the same place earlier or later."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from that offset on."""

    def read(self, offset: int, length: int) -> bytes:
        """Those bytes as a new object; for small things such as headers."""

    def check_unchanged(self) -> None:
        """Raise ChangedInputError if what the name leads to is not what was opened any more."""

    def close(self) -> None:
        """Let go of it; it cannot be read afterwards."""


@runtime_checkable
class Reader(Protocol):
    """A model whose tensors can be read by byte range, from several threads at once."""

    @property
    def name(self) -> str:
        """What messages call this model: its path, or a word for an in-memory mapping."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """All tensors, in the order of their data."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free text that travels with the tensors."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of tensor `name` from byte `start` on."""

    def close(self) -> None:
        """Let go of files; the reader cannot be used afterwards."""


@runtime_checkable
class Tracked(Protocol):
    """A reader that can tell whether what it reads is still the same; most can."""

    @property
    def fingerprint(self) -> str:
        """What tells this content from another that stood in the same place earlier or later."""

    def check_unchanged(self) -> None:
        """Raise ChangedInputError if it is not what was opened any more."""


@runtime_checkable
class Writer(Protocol):
    """A destination that shows either all declared tensors or, before commit and after abort, none.

    It may also have `completed`, the names that an earlier run has finished, known after `declare`; and
    `finished(name)`, which is called when all of a tensor is written and it is not dropped; and `settle()`, see the
    function of that name.
    """

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        """State every tensor that may be written; called once, before anything is written."""

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        """Store the buffer at byte `start` of tensor `name`; any order, any thread."""

    def drop(self, name: str) -> None:
        """A declared tensor will not be written after all; the result lacks it."""

    def commit(self) -> None:
        """Publish the result; every tensor that was not dropped must be complete by now."""

    def abort(self) -> None:
        """Remove every trace of this writer. Harmless after commit or a second time."""


def check_unchanged(reader: Reader) -> None:
    """Refuse a model that was changed since it was opened, where its reader can tell.

    Raises:
        ChangedInputError: it was.
    """
    getattr(reader, "check_unchanged", lambda: None)()


def settle(writer: Writer) -> None:
    """Make all that is complete durable and note it for a run that goes on from there, where the writer can.

    Raises:
        OutputError: the disk refused.
    """
    getattr(writer, "settle", lambda: None)()


def flat_bytes(buffer: memoryview) -> memoryview:
    """The same memory as a one-dimensional view of bytes, whatever shape and format the caller's view has."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1:
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")


def check_range(name: str, start: int, length: int, nbytes: int) -> None:
    """Refuse a range that leaves the tensor: it would read or overwrite a neighbour's bytes."""
    if start < 0 or start + length > nbytes:
        raise ValueError(f"bytes {start} to {start + length} are outside tensor {name!r} of {nbytes} bytes")
