"""Where the bytes of a range that is being fetched come from, and what takes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

Sink = Callable[[memoryview], None]
"""Takes the next bytes of a range that is being fetched; they are only valid during the call."""


class Fetched(Protocol):
    """A file whose ranges are fetched."""

    @property
    def size(self) -> int:
        """Bytes in it."""

    def fetch(self, start: int, stop: int, sink: Sink) -> None:
        """Hand all bytes of the range to the sink, in order."""


class LendingSink(ABC):
    """A sink that can lend its memory, so that bytes are received where they belong, without a copy."""

    @abstractmethod
    def room(self) -> memoryview:
        """Memory for the next bytes; at least one, if any are to come."""

    @abstractmethod
    def took(self, count: int) -> None:
        """So many bytes were written to the beginning of the room."""

    def __call__(self, data: memoryview) -> None:
        """Take a copy of the next bytes."""
        while data:
            room = self.room()
            piece = data[: len(room)]
            room[: len(piece)] = piece
            self.took(len(piece))
            data = data[len(piece) :]


class ViewSink(LendingSink):
    """A sink that fills a view."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def room(self) -> memoryview:
        return self._view

    def took(self, count: int) -> None:
        self._view = self._view[count:]


class CountingSink(LendingSink):
    """A sink that hands on to another one, and knows how much.

    Attributes:
        done: bytes handed on.
    """

    def __init__(self, sink: Sink, piece: int = 256 * 2**10) -> None:
        self._sink = sink
        self._piece = piece
        self._own: memoryview | None = None
        self.done = 0

    def room(self) -> memoryview:
        if isinstance(self._sink, LendingSink):
            return self._sink.room()
        if self._own is None:
            self._own = memoryview(bytearray(self._piece))
        return self._own

    def took(self, count: int) -> None:
        if isinstance(self._sink, LendingSink):
            self._sink.took(count)
        else:
            self._sink(self.room()[:count])
        self.done += count

    def __call__(self, data: memoryview) -> None:
        self._sink(data)
        self.done += len(data)
