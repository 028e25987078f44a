from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
import weakref

import pytest

from sd_mecha.storage.remote import block_cache
from sd_mecha.storage.remote.block_cache import BlockCache, Sink
from sd_mecha.storage.remote.read_ahead import ReadAhead

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


def make(*files: Slow, slots: int = 4, ahead: int = 0, per_file: int = 1) -> BlockCache:
    """A cache of small blocks: 1000 bytes of 100-byte chunks."""
    cache = BlockCache(slots * 1000, block=1000, chunk=100, ahead=ahead, per_file=per_file)
    for file in files:
        cache.add(file)
    return cache


def settle() -> None:
    """Wait until nothing is fetched in the background."""
    deadline = time.monotonic() + 10
    while any("read-ahead" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("ahead", [0, 3000])
def test_any_range_reads_back(ahead):
    a, b = Slow(), Slow(CONTENT[::-1][:9_950])
    cache = make(a, b, ahead=ahead)
    chance = random.Random(1)
    for _ in range(300):
        file = chance.choice([a, b])
        offset = chance.randrange(file.size)
        length = chance.randrange(min(2_500, file.size - offset) + 1)
        assert read(cache, file, offset, length) == file.content[offset : offset + length]
    settle()
    cache.forget(a)
    cache.forget(b)


def test_only_touched_chunks_are_fetched_and_only_once():
    file = Slow()
    cache = make(file)
    read(cache, file, 250, 100)
    assert file.fetched == [(200, 400)]
    read(cache, file, 200, 200)
    read(cache, file, 150, 400)
    assert file.fetched == [(200, 400), (100, 200), (400, 600)]
    read(cache, file, 9_990, 10)
    assert file.fetched[3:] == [(9_900, 10_000)]
    cache.forget(file)


def test_the_block_used_least_recently_makes_room():
    file = Slow()
    cache = make(file, slots=3)
    for offset in (0, 1_000, 2_000, 0, 3_000):  # the block at 1000 goes
        read(cache, file, offset, 10)
    file.fetched.clear()
    for offset in (0, 2_000, 3_000):
        read(cache, file, offset, 10)
    assert file.fetched == []
    read(cache, file, 1_000, 10)
    assert file.fetched == [(1_000, 1_100)]
    cache.forget(file)


def test_the_temporary_file_is_bounded_and_has_no_name_and_goes_with_the_last_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    files = [Slow(), Slow()]
    cache = make(*files, slots=3)
    for file in files:
        for offset in range(0, 10_000, 100):
            read(cache, file, offset, 100)
    storage = cache._file
    assert storage is not None
    assert os.fstat(storage.fileno()).st_size <= 3_000
    assert os.name == "nt" or os.listdir(tmp_path) == []
    cache.forget(files[0])
    assert not storage.closed
    cache.forget(files[1])
    assert storage.closed
    cache.add(files[0])
    assert read(cache, files[0], 5_000, 500) == CONTENT[5_000:5_500], "it begins anew"
    cache.forget(files[0])


def test_every_open_file_may_count_on_some_blocks():
    files = [Slow() for _ in range(10)]
    cache = make(*files, slots=4, per_file=2)
    assert cache.slots == 20
    for _ in range(2):
        for file in files:
            assert read(cache, file, 4_500, 1_000) == CONTENT[4_500:5_500]
    assert all(file.total == 1_000 for file in files)
    for file in files:
        cache.forget(file)
    assert cache.slots == 4


def test_concurrent_readers_wait_for_one_fetch():
    file = Slow()
    cache = make(file)
    file.go.clear()
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda: got.append(read(cache, file, 100, 300))) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.03)
    assert file.fetched == [(100, 400)]
    file.go.set()
    for thread in threads:
        thread.join()
    assert got == [CONTENT[100:400]] * 5
    assert file.fetched == [(100, 400)]
    cache.forget(file)


def test_a_failed_fetch_is_told_and_does_not_stick():
    file = Slow()
    cache = make(file)
    file.failures = 1
    file.go.clear()
    results: list[object] = []

    def work() -> None:
        try:
            results.append(read(cache, file, 0, 100))
        except OSError as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    file.go.set()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == sorted(["the line is dead", str(CONTENT[:100]), str(CONTENT[:100])])
    cache.forget(file)


def test_reading_in_a_row_is_seen_and_reading_at_random_is_not():
    file = Slow()
    cache = make(file, ahead=4_000, slots=20)
    for offset in (5_000, 200, 9_000, 3_000):
        read(cache, file, offset, 100)
    settle()
    assert file.total == 400
    for offset in range(3_100, 4_000, 100):
        read(cache, file, offset, 100)
        settle()
    assert file.total > 400 + 900, "something was fetched ahead"
    assert file.total <= 400 + 2 * 1_000 + 100, "but no more than was read in a row"
    file.fetched.clear()
    for offset in range(4_000, 10_000, 100):
        assert read(cache, file, offset, 100) == CONTENT[offset : offset + 100]
        settle()
    assert len(file.fetched) < 20, "large ranges are fetched, not chunk by chunk"
    assert file.total <= 6_000
    cache.forget(file)


def test_the_blocks_of_a_long_range_are_fetched_side_by_side():
    file = Slow()
    cache = make(file, ahead=4_000, slots=20)
    file.go.clear()
    thread = threading.Thread(target=read, args=(cache, file, 0, 4_000))
    thread.start()
    deadline = time.monotonic() + 10
    while len(file.fetched) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(file.fetched) == [(0, 1_000), (1_000, 2_000), (2_000, 3_000), (3_000, 4_000)]
    file.go.set()
    thread.join()
    settle()
    cache.forget(file)


def test_a_full_disk_is_no_failure(monkeypatch, caplog):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = Slow()
    cache = make(file)
    monkeypatch.setattr(os, "pwrite", full)
    for offset in (0, 50, 3_990):
        assert read(cache, file, offset, 100) == CONTENT[offset : offset + 100]
    assert [record.message for record in caplog.records] == [
        "no room on disk for reading remote files ahead ([Errno 28] No space left on device); they are read directly"
    ]
    cache.forget(file)


def test_no_temporary_folder_is_no_failure(monkeypatch, caplog):
    def none(**kwargs: object) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "TemporaryFile", none)
    file = Slow()
    cache = make(file)
    assert read(cache, file, 100, 2_000) == CONTENT[100:2_100]
    assert "no usable temporary directory" in caplog.text
    cache.forget(file)


def test_closing_while_others_read(monkeypatch):
    file, other = Slow(), Slow()
    cache = make(file, slots=2)
    file.go.clear()
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(read(cache, file, 0, 100)))
    thread.start()
    deadline = time.monotonic() + 10
    while not file.fetched and time.monotonic() < deadline:
        time.sleep(0.001)
    cache.forget(file)
    cache.add(other)
    for offset in range(0, 10_000, 500):
        assert read(cache, other, offset, 100) == CONTENT[offset : offset + 100], "its slot is not taken over"
    file.go.set()
    thread.join()
    assert got == [CONTENT[:100]]
    cache.forget(other)


def test_runs_of_bits():
    assert list(block_cache._runs(0)) == []
    assert list(block_cache._runs(0b1)) == [(0, 1)]
    assert list(block_cache._runs(0b1110_0101_1000)) == [(3, 5), (6, 7), (9, 12)]


def test_the_folder_is_the_one_that_was_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert block_cache.cache_folder() is None
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert block_cache.cache_folder() in (None, "/var/tmp")


def test_a_block_is_a_whole_number_of_chunks():
    with pytest.raises(ValueError, match="whole number of chunks"):
        BlockCache(block=1000, chunk=300)


def test_read_ahead_drops_what_is_too_much_and_what_fails():
    done: list[int] = []
    go = threading.Event()
    queue = ReadAhead(1, longest=3)
    owner, other = Slow(), Slow()
    queue.submit(owner, "wait", lambda: (go.wait(10), 1 / 0)[0])
    time.sleep(0.01)
    for number in (1, 2, 3, 3, 4):
        queue.submit(owner, number, lambda n=number: done.append(n))
    queue.submit(other, 5, lambda: done.append(5))
    queue.forget(other)
    go.set()
    settle()
    assert done in ([3, 4], [2, 3, 4])
    reference = weakref.ref(owner)
    del owner
    assert reference() is None, "nothing holds on to files"
