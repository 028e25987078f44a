"""Remote files as files: read by range through the cache, tried again after failures, watched for changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sd_mecha.errors import ChangedInputError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.contract import flat_bytes
from sd_mecha.storage.remote.block_cache import CACHE, BlockCache
from sd_mecha.storage.remote.places import Found, InterruptedFetch, Place
from sd_mecha.storage.remote.sinks import CountingSink, Sink

T = TypeVar("T")


@dataclass
class Patience:
    """How often, and after which pauses, a failed request is tried again."""

    attempts: int = 5
    pause: float = 0.5  # seconds after the first failure; each further one doubles it
    longest: float = 30.0

    def after(self, failures: int, asked: float | None) -> None:
        """Wait for as long as the server asked for, else for the next pause."""
        time.sleep(min(self.pause * 2 ** (failures - 1) if asked is None else asked, self.longest))

    def run(self, attempt: Callable[[], T], failed: Callable[[], str]) -> T:
        """The result of the first attempt that is not interrupted.

        Args:
            attempt: what to do.
            failed: the beginning of the message when all attempts were interrupted.

        Raises:
            ModelAccessError: all were.
        """
        for failures in range(1, self.attempts + 1):
            try:
                return attempt()
            except InterruptedFetch as error:
                if failures == self.attempts:
                    raise ModelAccessError(
                        f"{failed()}: {error.reason}; tried {failures} times; check the connection and try again"
                    ) from error
                self.after(failures, error.wait)
        raise AssertionError("no attempt was allowed")


PATIENCE = Patience()
LARGEST = 16 * 2**40
"""Bytes of the largest file that is believed in: the cache has a note of each of its blocks."""


def find(place: Place) -> Found:
    """What stands at a place, asked more than once if need be.

    Raises:
        ModelNotFoundError, ModelAccessError: no file, or none that can be read.
    """
    found = PATIENCE.run(place.find, lambda: f"{place.name}: cannot be reached")
    if found.size > LARGEST:
        raise ModelAccessError(f"{place.name}: has {found.size} bytes; expected at most {LARGEST}; check the address")
    return found


class _Content:
    """The content that was found at a place. The cache holds on to this, and not to the file that is read."""

    def __init__(self, place: Place, found: Found) -> None:
        self.place = place
        self.found = found

    @property
    def size(self) -> int:
        return self.found.size

    def fetch(self, start: int, stop: int, sink: Sink) -> None:
        """Hand all bytes of a range to the sink; after an interruption, the missing ones are asked for."""
        counting = CountingSink(sink)

        def attempt() -> None:
            while (begin := start + counting.done) < stop:  # some servers send so many bytes at a time and no more
                self.place.fetch(self.found, begin, stop, counting)
                if start + counting.done == begin:
                    raise InterruptedFetch(f"got {counting.done} of {stop - start} bytes")

        PATIENCE.run(attempt, lambda: f"{self.place.name}: cannot be read at byte {start + counting.done}")


class RemoteFile:
    """A file at an address that is read by range, from several threads at once.

    Args:
        place: where it is.
        found: what was found there; by default it is asked now.
        cache: what is read goes through it.

    Raises:
        ModelNotFoundError, ModelAccessError: there is no file, or none that can be read by range.
    """

    def __init__(self, place: Place, found: Found | None = None, *, cache: BlockCache = CACHE) -> None:
        self.closed = True
        self._place = place.opened()
        self._content = _Content(self._place, find(self._place) if found is None else found)
        self._cache = cache
        cache.add(self._content)
        self.closed = False

    @property
    def name(self) -> str:
        """The address, without secrets."""
        return self._place.name

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._content.size

    @property
    def fingerprint(self) -> str:
        """Address, size and what the server says to tell contents apart; an AttributeError where it says nothing."""
        if not self._content.found.marks:
            raise AttributeError(f"{self.name}: only its size is known")
        return f"{self.name} {self._content.found.identity}"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from that offset on; safe from several threads.

        Raises:
            ChangedInputError: it is not the file any more that was opened.
            ModelAccessError: it cannot be read, although it was tried several times.
        """
        if self.closed:
            raise ValueError(f"{self.name}: read after close()")
        view, head = flat_bytes(buffer), self._content.found.head
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"{self.name}: bytes {offset} to {offset + len(view)} are outside of {self.size}")
        if offset + len(view) <= len(head):
            view[:] = head[offset : offset + len(view)]
        else:
            self._cache.read_into(self._content, offset, view)

    def read(self, offset: int, length: int) -> bytes:
        """Those bytes as a new object; for small things such as headers."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def check_unchanged(self) -> None:
        """Ask the server again, and compare.

        Raises:
            ChangedInputError: the file was replaced or removed since it was opened.
            ModelAccessError: the server cannot be asked any more.
        """
        try:
            now = find(self._place)
        except ModelNotFoundError as error:
            raise ChangedInputError(f"{self.name}: vanished while it was in use: {error}") from error
        self._content.found.compare(self.name, now)

    def close(self) -> None:
        """Let go of connections and of what the cache holds."""
        self.closed = True
        self._cache.forget(self._content)
        self._place.close()

    def __del__(self) -> None:
        if not self.closed:  # the place lets go of its connections when the cache lets go of the content
            self._cache.lose(self._content)
