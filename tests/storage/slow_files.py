"""Files that are fetched through a cache of small blocks, and how they are read."""

from __future__ import annotations

import random
import threading
import time

from sd_mecha.storage.remote.block_cache import BlockCache
from sd_mecha.storage.remote.read_ahead import ReadAhead
from sd_mecha.storage.remote.sinks import Sink

CONTENT = random.Random(0).randbytes(10_000)


class Slow:
    """A file that notes what is fetched; it can be made to wait, and to fail."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.fetched: list[tuple[int, int]] = []
        self.go = threading.Event()
        self.go.set()
        self.failures = 0
        self.lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def total(self) -> int:
        return sum(stop - start for start, stop in self.fetched)

    def fetch(self, start: int, stop: int, sink: Sink) -> None:
        with self.lock:
            self.fetched.append((start, stop))
            fails = self.failures > 0
            self.failures -= fails
        assert self.go.wait(10)
        if fails:
            raise OSError("the line is dead")
        for at in range(start, stop, 37):
            sink(memoryview(self.content)[at : min(at + 37, stop)])


def read(cache: BlockCache, file: Slow, offset: int, length: int) -> bytes:
    data = bytearray(length)
    cache.read_into(file, offset, memoryview(data))
    return bytes(data)


def make(*files: Slow, slots: int = 40, memory: int = 3, ahead: int = 0, per_file: int = 10) -> BlockCache:
    """A cache of 100-byte blocks, of which so many fit on disk and in memory; ten are asked for at once at most."""
    cache = BlockCache(slots * 100, memory=memory * 100, block=100, longest=1_000, ahead=ahead, per_file=per_file)
    for file in files:
        cache.add(file)
    return cache


def settle(queue: ReadAhead) -> None:
    """Wait until nothing is fetched in the background."""
    deadline = time.monotonic() + 10
    while queue.busy:
        assert time.monotonic() < deadline
        time.sleep(0.001)
