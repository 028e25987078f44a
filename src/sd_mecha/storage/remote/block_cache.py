"""A read-ahead cache for files that are slow to ask, in memory and on disk.

All remote files share it. A file is divided into blocks, the least that is fetched. A block is fetched into memory.
When every byte of it was read once, its memory is given to the next block, for a merge reads nearly every byte once:
most blocks never touch the disk. What is displaced from memory before it was read goes to a temporary file. Only when
all open files fit into that file together, blocks are kept there after they were read, too. Memory and temporary file
are of bounded size; both give the room of the block that was used least recently to the next one.

Where blocks are read one after another, those that come next are fetched in the background: as many as were
read in a row so far, up to a limit. What is fetched in vain is therefore at most as much as what was needed.

A block that is being fetched is waited for, never fetched twice at the same time. Without a usable disk, what is
displaced from memory is fetched again when it is needed.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, deque

from sd_mecha.storage.remote.blocks import Block, Filling
from sd_mecha.storage.remote.forks import renew_in_child
from sd_mecha.storage.remote.look_ahead import choose
from sd_mecha.storage.remote.read_ahead import ReadAhead
from sd_mecha.storage.remote.sinks import Fetched, ViewSink
from sd_mecha.storage.remote.spill_file import SpillFile


class BlockCache:
    """Blocks of remote files.

    Args:
        limit: bytes that the temporary file may take; more only where that is less than `per_file` blocks per file.
        memory: bytes that blocks in memory may take; one block more for every thread that is just filling one.
        block: bytes of a block, the least that is fetched.
        longest: bytes that are asked for at once, at most.
        ahead: bytes that are fetched before they are asked for, at most, for each place where a file is read.
        per_file: blocks that each open file may count on.
        workers: how many ranges are fetched in the background at once.
    """

    def __init__(
        self,
        limit: int = 512 * 2**20,
        *,
        memory: int = 48 * 2**20,
        block: int = 2**20,
        longest: int = 4 * 2**20,
        ahead: int = 8 * 2**20,
        per_file: int = 12,
        workers: int = 6,
    ) -> None:
        self._limit = limit
        self._block = block
        self._longest = max(longest // block, 1)
        self._ahead = ahead // block
        self._per_file = per_file
        self._most = memory // block  # buffers
        self._workers = workers
        self._files: set[Fetched] = set()
        self._lost: deque[Fetched] = deque()  # not read any more, but not forgotten yet
        self._keeps = False  # whether blocks stay after they were read
        self._disk = SpillFile(block)
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Keep nothing but which files are open."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        with self._lock:
            self._made = 0
            self._spare: list[memoryview] = []
            self._blocks: dict[tuple[Fetched, int], Block] = {}
            self._in_memory: OrderedDict[Block, None] = OrderedDict()
            self._on_disk: OrderedDict[Block, None] = OrderedDict()
            # for each block, whether it was read and dropped
            self._passed = {file: self._none_of(file) for file in self._files}
            self._disk.close()
            self._disk = SpillFile(self._block)
            self._slots_made = 0
            self._free: list[int] = []
            self._orphans: set[Block] = set()  # forgotten, but still in use
            self.read_ahead = ReadAhead(self._workers)

    @property
    def slots(self) -> int:
        """Blocks that are kept on disk at most, given the files that are open now."""
        return max(self._limit // self._block, self._per_file * len(self._files), 1)

    def add(self, file: Fetched) -> None:
        """A file is going to be read."""
        self._forget_lost()
        with self._lock:
            self._files.add(file)
            self._passed[file] = self._none_of(file)
            self._keeps = sum(each.size for each in self._files) <= self._limit

    def forget(self, file: Fetched) -> None:
        """A file will not be read any more. After the last one, memory, temporary file and threads are gone."""
        self._forget_lost()
        with self._lock:
            self._forget(file)
        self.read_ahead.forget(file)
        if not self._files:
            self.read_ahead.dismiss()

    def lose(self, file: Fetched) -> None:
        """As `forget`, but for finalizers: waits for no lock.

        They run anywhere, even where their thread holds the lock. Then the next to come forgets the file.
        """
        self._lost.append(file)
        self._forget_lost(blocking=False)

    def _forget_lost(self, *, blocking: bool = True) -> None:
        gone = []  # so that files end after the lock was released
        if self._lost and self._lock.acquire(blocking):
            try:
                while self._lost:
                    gone.append(self._lost.popleft())
                    self._forget(gone[-1])
            finally:
                self._lock.release()

    def _forget(self, file: Fetched) -> None:
        self._files.discard(file)
        self._keeps = sum(each.size for each in self._files) <= self._limit
        self._passed.pop(file, None)
        for key in [key for key in self._blocks if key[0] is file]:
            self._drop(self._blocks[key])
        self._give_back_room()

    def _none_of(self, file: Fetched) -> bytearray:
        return bytearray(-(-file.size // self._block))

    def read_into(self, file: Fetched, offset: int, view: memoryview) -> None:
        """Fill a flat view of bytes from that offset of the file on."""
        if not len(view):
            return
        if self._lost:
            self._forget_lost()
        first, following = offset // self._block, -(-(offset + len(view)) // self._block)
        asked = first
        done = 0
        while done < len(view):
            number, start = divmod(offset + done, self._block)
            if number >= asked:  # what comes later in a long range is fetched beside its beginning
                asked = number + self._longest
                self._ask(file, asked, min(number + self._ahead, following))
            piece = view[done : done + self._block - start]
            block = self._get(file, number, following)
            if block is None:
                file.fetch(offset + done, offset + done + len(piece), ViewSink(piece))
            else:
                self._take_from(block, offset + done, piece)
            done += len(piece)
        self._look_ahead(file, first, following)

    def _get(self, file: Fetched, number: int, following: int) -> Block | None:
        """A block that is ready, with one more user; with it, what is missing up to `following` may be fetched.

        None if the file was forgotten.
        """
        while True:
            with self._lock:
                if file not in self._files:
                    return None
                block = self._blocks.get((file, number))
                mine = [] if block else self._claim(file, number, min(following, number + self._longest))
                if mine and self._passed[file][number]:  # a second time: those that follow may be wanted again, too
                    self._passed[file][number:] = bytes(len(self._passed[file]) - number)
                block = block or mine[0]
                block.users += 1
                if block.ready:
                    (self._in_memory if block in self._in_memory else self._on_disk).move_to_end(block)
            try:
                self._fill(file, mine)
                with self._lock:
                    while not (block.ready or block.failed):
                        self._changed.wait()
            except BaseException:
                self._release(block, 0)
                raise
            if block.ready:
                return block
            self._release(block, 0)

    def _claim(self, file: Fetched, first: int, last: int) -> list[Block]:
        """New blocks for the run of missing ones from the first on, for this thread to fill."""
        mine = []
        for number in range(first, last):
            key = file, number
            if key in self._blocks:
                break
            block = Block(key, min(self._block, file.size - number * self._block))
            self._blocks[key] = block
            mine.append(block)
        return mine

    def _fill(self, file: Fetched, blocks: list[Block]) -> None:
        """Fetch blocks that were claimed. Whatever happens, each one is ready or failed afterwards."""
        if not blocks:
            return
        start = blocks[0].key[1] * self._block
        filling = Filling(self, blocks)
        try:
            file.fetch(start, start + sum(block.length for block in blocks), filling)
        finally:
            filling.close()
            with self._lock:
                for block in blocks:
                    if not block.ready:
                        block.failed = True
                        self._drop(block)
                        self._changed.notify_all()
                self._give_back_room()

    def _take_from(self, block: Block, offset: int, piece: memoryview) -> None:
        """Copy bytes of a block that is in use, and let go of it."""
        start = offset % self._block
        read = 0
        try:
            data = block.data
            if data is not None:
                piece[:] = data[start : start + len(piece)]
            elif block.slot is None or not self._disk.load(block.slot, start, piece):
                block.key[0].fetch(offset, offset + len(piece), ViewSink(piece))
            read = len(piece)
        finally:
            self._release(block, read)

    def _release(self, block: Block, read: int) -> None:
        with self._lock:
            block.users -= 1
            block.unread -= read
            if self._blocks.get(block.key) is not block:
                self._drop(block)
                self._give_back_room()
            elif block.unread <= 0 and not self._keeps and not block.users:
                self._drop(block)
                file, number = block.key
                self._passed[file][number] = 1

    def _drop(self, block: Block) -> None:
        """Forget a block; its room is given back when nobody uses it any more."""
        if self._blocks.get(block.key) is block:
            del self._blocks[block.key]
        self._in_memory.pop(block, None)
        self._on_disk.pop(block, None)
        if block.users or not (block.ready or block.failed):
            self._orphans.add(block)
            return
        self._orphans.discard(block)
        data, block.data = block.data, None
        slot, block.slot = block.slot, None
        if slot is not None:
            self._free.append(slot)
        if data is not None:
            self._give_back(data)

    def done(self, block: Block, data: memoryview) -> None:
        """A block was fetched."""
        with self._lock:
            block.data, block.ready = data, True
            if self._blocks.get(block.key) is block:
                self._in_memory[block] = None
            else:  # the file was forgotten meanwhile
                self._drop(block)
                self._give_back_room()
            if block.users:
                self._changed.notify_all()

    def give_back(self, data: memoryview) -> None:
        """A buffer is free again."""
        with self._lock:
            self._give_back(data)

    def _give_back(self, data: memoryview) -> None:
        if self._made > self._most or not self._files:
            self._made -= 1
        else:
            self._spare.append(data)

    def buffer(self) -> memoryview:
        """Memory for a block: fresh, or that of the block that was used least recently."""
        while True:
            with self._lock:
                if self._spare:
                    return self._spare.pop()
                victim = next((block for block in list(self._in_memory) if not block.users), None)
                if self._made < self._most or victim is None:
                    self._made += 1
                    break
                data = victim.data
                assert data is not None
                slot = self._slot() if victim.slot is None else None
                if slot is None:  # it is on disk already, or has to be fetched again
                    victim.data = None
                    self._in_memory.pop(victim, None)
                    if victim.slot is None:
                        self._drop(victim)
                    return data
                victim.users += 1
            kept = self._disk.store(slot, data)
            with self._lock:
                if kept and self._blocks.get(victim.key) is victim:
                    victim.slot = slot
                    self._on_disk[victim] = None
                else:
                    self._free.append(slot)
            self._release(victim, 0)
        try:
            return memoryview(bytearray(self._block))
        except BaseException:
            with self._lock:
                self._made -= 1
            raise

    def _slot(self) -> int | None:
        """Room on disk; None if all is in use, or there is no disk."""
        if self._disk.broken:
            return None
        if not self._free and self._slots_made < self.slots:
            self._slots_made += 1
            return self._slots_made - 1
        if not self._free:
            victim = next((block for block in list(self._on_disk) if not block.users), None)
            if victim is None:
                return None
            if victim.data is None:
                self._drop(victim)
            else:
                self._on_disk.pop(victim)
                slot, victim.slot = victim.slot, None
                return slot
        return self._free.pop()

    def _give_back_room(self) -> None:
        """Without files and users, nothing is kept."""
        if not self._files:
            self._made -= len(self._spare)
            self._spare.clear()
            if not self._orphans:
                self._free.clear()
                self._slots_made = 0
                self._disk.close()

    def _look_ahead(self, file: Fetched, first: int, following: int) -> None:
        """After a read of the blocks `first` to `following`, have those fetched that come next.

        So that a few large ranges are fetched rather than many small ones, nothing is done before half of them lack.
        """
        with self._lock:
            if file not in self._files:
                return
            most = min(self._ahead, len(self._passed[file]) - following)
            if most <= 0 or (self._is_known(file, following) and self._is_known(file, following + most // 2)):
                return
            known = functools.partial(self._is_known, file)
            chosen = choose(known, first, following, most, self._ahead, self._longest)
        if chosen:
            self._ask(file, *chosen)

    def _is_known(self, file: Fetched, number: int) -> bool:
        """Whether a block is there, on its way, or was read before."""
        return (file, number) in self._blocks or self._passed[file][number] == 1

    def _ask(self, file: Fetched, first: int, last: int) -> None:
        """Have blocks fetched in the background."""
        wanted = []
        with self._lock:
            if file not in self._files:
                return
            while first < last:
                if self._is_known(file, first):
                    first += 1
                    continue
                wanted.append((first, min(first + self._longest, last)))
                first += self._longest
        for first, until in wanted:
            self.read_ahead.submit(file, (first, until), functools.partial(self._prefetch, file, first, until))

    def _prefetch(self, file: Fetched, first: int, last: int) -> None:
        while first < last:
            with self._lock:
                if file not in self._files:
                    return
                # what was read meanwhile is not needed once more
                mine = [] if self._is_known(file, first) else self._claim(file, first, last)
            self._fill(file, mine)
            first += max(len(mine), 1)


CACHE = BlockCache()
