"""A read-ahead cache on disk for files that are slow to ask.

All remote files share one temporary file of bounded size, which has no name and vanishes with the process. It is
divided into slots that hold a block of some file each; a block is filled by chunks, so that a small read
fetches little. Where chunks are read one after another, those that come next are fetched in the background: as
many as were read in a row so far, up to a limit. What is fetched in vain is therefore at most as much as what was
needed. The slot that was used least recently is given to the next block.

A chunk that is being fetched is waited for, never fetched twice. Without a usable disk everything is read
directly.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.remote.read_ahead import ReadAhead

Sink = Callable[[memoryview], None]
"""Takes the next bytes of a range that is being fetched; they are only valid during the call."""

_logger = logging.getLogger("sd_mecha")


class Fetched(Protocol):
    """A file whose ranges are fetched."""

    @property
    def size(self) -> int:
        """Bytes in it."""

    def fetch(self, start: int, stop: int, sink: Sink) -> None:
        """Hand all bytes of the range to the sink, in order."""


class _Block:
    """Which chunks of a block its slot holds (`filled`) and which are on their way (`pending`), as bit sets."""

    __slots__ = ("filled", "pending", "slot", "users")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.filled = 0
        self.pending = 0
        self.users = 0


class BlockCache:
    """Blocks of remote files in a temporary file.

    Args:
        limit: bytes that the temporary file may take; more only where that is less than `per_file` blocks per file.
        block: bytes of a block.
        chunk: bytes of a chunk, the least that is fetched; a block has a whole number of them.
        ahead: bytes that are fetched before they are asked for, at most.
        per_file: blocks that each open file may count on.
        workers: how many ranges are fetched in the background at once.
    """

    def __init__(
        self,
        limit: int = 512 * 2**20,
        *,
        block: int = 4 * 2**20,
        chunk: int = 256 * 2**10,
        ahead: int = 16 * 2**20,
        per_file: int = 3,
        workers: int = 6,
    ) -> None:
        if block % chunk:
            raise ValueError(f"a block of {block} bytes is no whole number of chunks of {chunk}")
        self._limit = limit
        self._block = block
        self._chunk = chunk
        self._per_block = block // chunk
        self._ahead = ahead // chunk
        self._per_file = per_file
        self._blocks: OrderedDict[tuple[Fetched, int], _Block] = OrderedDict()
        self._free: list[int] = []
        self._made = 0  # slots that the temporary file has so far
        self._orphans = 0  # blocks still in use whose file was forgotten
        self._files: set[Fetched] = set()
        self._file: BinaryIO | None = None
        self._broken = False
        # Re-entrant: a file may be garbage-collected, hence forgotten, while this thread holds the lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._io_lock = threading.Lock()  # guards the file position where positional reads are missing
        self._read_ahead = ReadAhead(workers)

    @property
    def slots(self) -> int:
        """Blocks that are kept at most, given the files that are open now."""
        return max(self._limit // self._block, self._per_file * len(self._files), 1)

    def add(self, file: Fetched) -> None:
        """A file is going to be read."""
        with self._lock:
            self._files.add(file)

    def forget(self, file: Fetched) -> None:
        """A file will not be read any more. After the last one, the temporary file and the threads are gone."""
        with self._lock:
            self._files.discard(file)
            self._read_ahead.forget(file)
            for key in [key for key in self._blocks if key[0] is file]:
                block = self._blocks.pop(key)
                if block.users:
                    self._orphans += 1
                else:
                    self._free.append(block.slot)
            self._drop_unused_storage()

    def read_into(self, file: Fetched, offset: int, view: memoryview) -> None:
        """Fill a flat view of bytes from that offset of the file on."""
        if not len(view):
            return
        first, following = offset // self._chunk, -(-(offset + len(view)) // self._chunk)
        with self._lock:  # the other blocks of a long range are fetched beside the first one
            next_block = (first // self._per_block + 1) * self._per_block
            self._ask(file, self._lacking(file, next_block, following))
        done = 0
        while done < len(view):
            number, start = divmod(offset + done, self._block)
            piece = view[done : done + self._block - start]
            with self._use(file, number) as block:
                if block is None or not self._read_block(file, number, block, start, piece):
                    _read_directly(file, offset + done, piece)
            done += len(piece)
        self._look_ahead(file, first, following)

    def _read_block(self, file: Fetched, number: int, block: _Block, start: int, piece: memoryview) -> bool:
        wanted = self._mask(start, start + len(piece))
        while True:
            with self._lock:
                missing = wanted & ~block.filled
                if not missing or self._broken:
                    break
                mine = missing & ~block.pending
                if not mine:
                    self._changed.wait()
                    continue
                block.pending |= mine
            self._fill(file, number, block, mine)
        return not self._broken and self._load(block.slot * self._block + start, piece)

    def _fill(self, file: Fetched, number: int, block: _Block, chunks: int) -> None:
        """Fetch chunks that are marked as pending. Whatever happens, they are not pending afterwards."""
        base, origin = number * self._block, block.slot * self._block
        try:
            for first, last in _runs(chunks):
                start = first * self._chunk
                stop = min(last * self._chunk, file.size - base)
                if start < stop:
                    file.fetch(base + start, base + stop, _Storing(self, origin + start))
                with self._lock:
                    if not self._broken:
                        block.filled |= (1 << last) - (1 << first)
                        block.pending &= ~((1 << last) - (1 << first))
                        self._changed.notify_all()
        finally:
            with self._lock:
                block.pending &= ~chunks
                self._changed.notify_all()

    def _look_ahead(self, file: Fetched, first: int, following: int) -> None:
        """After a read of the chunks `first` to `following`, have those fetched that come next.

        They are as many as were read in a row before. Nothing is done while half of them are there already, so
        that a few large ranges are fetched rather than many small ones.
        """
        with self._lock:
            window = min(self._streak(file, first), -(-file.size // self._chunk) - following)
            wanted = self._lacking(file, following, following + window)
            if sum(chunks.bit_count() for _, chunks in wanted) * 2 >= window:
                self._ask(file, wanted)

    def _lacking(self, file: Fetched, first: int, last: int) -> list[tuple[int, int]]:
        """The numbers of blocks, and which of the chunks from `first` up to `last` are missing in each."""
        lacking = []
        for number in range(first // self._per_block, -(-last // self._per_block)):
            base = number * self._per_block
            chunks = (1 << min(last - base, self._per_block)) - (1 << max(first - base, 0))
            block = self._blocks.get((file, number))
            if block is not None:
                chunks &= ~(block.filled | block.pending)
            if chunks:
                lacking.append((number, chunks))
        return lacking

    def _ask(self, file: Fetched, wanted: list[tuple[int, int]]) -> None:
        """Have chunks fetched in the background."""
        if self._broken or file not in self._files:
            return
        for number, chunks in wanted:
            self._read_ahead.submit(file, (number, chunks), functools.partial(self._prefetch, file, number, chunks))

    def _streak(self, file: Fetched, chunk: int) -> int:
        """How many chunks before that one are held, without a gap; what is read at random has none before it."""
        count = 0
        while count < self._ahead and chunk > count:
            number, index = divmod(chunk - count - 1, self._per_block)
            block = self._blocks.get((file, number))
            if block is None or not block.filled >> index & 1:
                break
            count += 1
        return count

    def _prefetch(self, file: Fetched, number: int, chunks: int) -> None:
        with self._use(file, number) as block:
            if block is None:
                return
            with self._lock:
                mine = chunks & ~(block.filled | block.pending)
                block.pending |= mine
            if mine:
                self._fill(file, number, block, mine)

    @contextlib.contextmanager
    def _use(self, file: Fetched, number: int) -> Iterator[_Block | None]:
        """A block that keeps its slot meanwhile; None if all slots are in use, or there is no disk."""
        block = self._acquire((file, number))
        try:
            yield block
        finally:
            if block is not None:
                with self._lock:
                    block.users -= 1
                    if not block.users and self._blocks.get((file, number)) is not block:
                        self._orphans -= 1
                        self._free.append(block.slot)
                        self._drop_unused_storage()

    def _acquire(self, key: tuple[Fetched, int]) -> _Block | None:
        with self._lock:
            block = self._blocks.get(key)
            if block is None:
                if self._broken or key[0] not in self._files or not self._has_storage():
                    return None
                slot = self._slot()
                if slot is None:
                    return None
                block = self._blocks[key] = _Block(slot)
            self._blocks.move_to_end(key)
            block.users += 1
            return block

    def _slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        if self._made < self.slots:
            self._made += 1
            return self._made - 1
        for key, block in self._blocks.items():
            if not block.users:
                del self._blocks[key]
                return block.slot
        return None

    def _mask(self, start: int, stop: int) -> int:
        """The chunks of a block that a range of bytes in it touches."""
        return (1 << -(-stop // self._chunk)) - (1 << start // self._chunk)

    def _has_storage(self) -> bool:
        if self._file is None:
            try:
                self._file = tempfile.TemporaryFile(prefix="sd-mecha-", dir=cache_folder(), buffering=0)  # noqa: SIM115
            except OSError as error:
                self._give_up(error)
        return self._file is not None

    def _drop_unused_storage(self) -> None:
        if self._files or self._orphans:
            return
        self._free.clear()
        self._made = 0
        if self._file is not None:
            self._file.close()
            self._file = None
        self._broken = False

    def store(self, position: int, data: memoryview) -> None:
        """Write into the temporary file; where that fails, the cache is not used any more."""
        file = self._file
        if self._broken or file is None:
            return
        try:
            while data:
                if capabilities.pwrite:
                    count = os.pwrite(file.fileno(), data, position)
                else:
                    with self._io_lock:
                        file.seek(position)
                        count = file.write(data)
                position += count
                data = data[count:]
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _load(self, position: int, view: memoryview) -> bool:
        file = self._file
        assert file is not None
        try:
            while view:
                if capabilities.preadv:
                    count = os.preadv(file.fileno(), [view], position)
                else:
                    with self._io_lock:
                        file.seek(position)
                        count = file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    return False
                position += count
                view = view[count:]
        except (OSError, ValueError) as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            if not self._broken:
                _logger.warning("no room on disk for reading remote files ahead (%s); they are read directly", error)
            self._broken = True
            self._changed.notify_all()


class _Storing:
    """A sink that writes to consecutive positions of the temporary file."""

    def __init__(self, cache: BlockCache, position: int) -> None:
        self._cache = cache
        self._position = position

    def __call__(self, data: memoryview) -> None:
        self._cache.store(self._position, data)
        self._position += len(data)


def _read_directly(file: Fetched, offset: int, view: memoryview) -> None:
    position = 0

    def sink(data: memoryview) -> None:
        nonlocal position
        view[position : position + len(data)] = data
        position += len(data)

    file.fetch(offset, offset + len(view), sink)


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """First and one past the last index of every run of ones."""
    first = 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        first, bits = first + zeros, bits >> zeros
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield first, first + ones
        first, bits = first + ones, bits >> ones


def cache_folder() -> str | None:
    """Where the temporary file goes: what TMPDIR and its like say, else a place that is rarely kept in memory."""
    chosen = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return "/var/tmp" if not chosen and os.access("/var/tmp", os.W_OK) else None


CACHE = BlockCache()
