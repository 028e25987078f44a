"""The blocks of the cache, and the sink that fills them."""

from __future__ import annotations

from typing import Protocol

from sd_mecha.storage.remote.sinks import Fetched, LendingSink


class Block:
    """A block that is being fetched (neither ready nor failed), or is in memory (`data`), on disk (`slot`) or both.

    It stays where it is while it has users.
    """

    __slots__ = ("data", "failed", "key", "length", "ready", "slot", "unread", "users")

    def __init__(self, key: tuple[Fetched, int], length: int) -> None:
        self.key = key
        self.length = length
        self.unread = length
        self.data: memoryview | None = None
        self.slot: int | None = None
        self.ready = False
        self.failed = False
        self.users = 0


class Keeper(Protocol):
    """What has memory for blocks, and keeps them."""

    def buffer(self) -> memoryview:
        """Memory for a block."""

    def give_back(self, data: memoryview) -> None:
        """A buffer is free again."""

    def done(self, block: Block, data: memoryview) -> None:
        """A block was fetched."""


class Filling(LendingSink):
    """A sink that fills one block after another."""

    def __init__(self, keeper: Keeper, blocks: list[Block]) -> None:
        self._keeper = keeper
        self._blocks = blocks[::-1]
        self._buffer: memoryview | None = None
        self._filled = 0

    def room(self) -> memoryview:
        if self._buffer is None:
            self._buffer = self._keeper.buffer()
        return self._buffer[self._filled : self._blocks[-1].length]

    def took(self, count: int) -> None:
        self._filled += count
        if self._buffer is not None and self._filled == self._blocks[-1].length:
            self._keeper.done(self._blocks.pop(), self._buffer)
            self._buffer, self._filled = None, 0

    def close(self) -> None:
        """Give back what was not needed."""
        if self._buffer is not None:
            self._keeper.give_back(self._buffer)
            self._buffer = None
