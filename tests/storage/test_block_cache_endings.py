"""What the cache holds ends well: in forked processes, with files that nobody closed, and after failures."""

from __future__ import annotations

import os
import threading
import weakref

import pytest

from sd_mecha.storage.remote import block_cache
from sd_mecha.storage.remote.block_cache import BlockCache
from sd_mecha.storage.remote.file import RemoteFile
from sd_mecha.storage.remote.places import Found
from sd_mecha.storage.remote.sinks import Sink
from tests.storage.forking import forks, in_child
from tests.storage.slow_files import CONTENT, Slow, make, read, settle


@forks
def test_a_child_has_a_temporary_file_of_its_own():
    one, two = Slow(), Slow(CONTENT[::-1])
    cache = make(one, two, memory=2, slots=400)
    for offset in range(0, 5_000, 100):
        read(cache, one, offset, 50)
    waits, goes = os.pipe()

    def work() -> bool:
        os.read(waits, 1)
        return all(
            read(cache, file, offset, 100) == file.content[offset : offset + 100]
            for file in (two, one)
            for offset in range(0, 10_000, 100)
        )

    ended = in_child(work)
    for offset in range(5_000, 10_000, 100):  # displaces what was read before, into the same slots as the child
        read(cache, one, offset, 50)
    os.write(goes, b"x")
    assert ended() == 0
    one.fetched.clear()
    assert read(cache, one, 0, 10_000) == CONTENT
    assert one.fetched == []
    os.close(waits)
    os.close(goes)
    cache.forget(one)
    cache.forget(two)


@forks
def test_a_child_does_not_wait_for_threads_that_only_its_parent_has():
    file = Slow()
    cache = make(file, ahead=4_000, slots=200)
    file.go.clear()
    thread = threading.Thread(target=read, args=(cache, file, 0, 4_000))
    thread.start()
    while len(file.fetched) < 4:
        thread.join(0.001)

    def work() -> bool:
        file.lock, file.go = threading.Lock(), threading.Event()
        file.go.set()
        return read(cache, file, 0, 10_000) == CONTENT

    with cache._lock, cache.read_ahead._arrived:
        ended = in_child(work)
    assert ended() == 0
    file.go.set()
    thread.join()
    settle(cache.read_ahead)
    cache.forget(file)


class Near:
    """A place whose files need no connection."""

    name = basename = "near"

    def find(self) -> Found:
        return Found(len(CONTENT), {}, b"")

    def fetch(self, found: Found, start: int, stop: int, sink: Sink) -> None:
        sink(memoryview(CONTENT)[start:stop])

    def is_folder(self) -> bool:
        return False

    def children(self) -> list[str]:
        return []

    def below(self, names: tuple[str, ...]) -> Near:
        return self

    def above(self) -> Near:
        return self

    def opened(self) -> Near:
        return self

    def close(self) -> None:
        pass


def opened(cache: BlockCache) -> tuple[list[RemoteFile], weakref.ref[object]]:
    """A file of which some was read, and a reference to what the cache has of it."""
    file = RemoteFile(Near(), cache=cache)
    for offset in range(0, 1_000, 100):
        file.read(offset, 50)
    return [file], weakref.ref(file._content)


def test_a_file_that_nobody_closed_is_forgotten():
    cache = make()
    files, content = opened(cache)
    storage = cache._disk._file
    assert storage is not None
    files.clear()
    assert content() is None
    assert storage.closed


def test_a_file_that_is_collected_amid_a_change_of_the_cache_is_forgotten_afterwards():
    cache, other = make(), Slow()
    files, content = opened(cache)
    with cache._lock:
        files.clear()  # stands for a run of the garbage collector
        assert content() is not None
    cache.add(other)
    assert content() is None
    files, content = opened(cache)
    with cache._lock:
        files.clear()
    assert read(cache, other, 0, 100) == CONTENT[:100]
    assert content() is None
    cache.forget(other)


@pytest.mark.parametrize("held", ["cache", "queue"])
def test_the_garbage_collector_waits_for_no_lock(held):
    cache, other = make(), Slow()
    files, content = opened(cache)
    thread = threading.Thread(target=files.clear, daemon=True)
    with cache._lock if held == "cache" else cache.read_ahead._arrived:
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    cache.forget(other)
    assert content() is None


class Flaky(Slow):
    """A file that cannot be fetched in the background."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.fail = threading.Event(), threading.Event()

    def fetch(self, start: int, stop: int, sink: Sink) -> None:
        if threading.current_thread().name != "sd-mecha read-ahead":
            return super().fetch(start, stop, sink)
        self.started.set()
        assert self.fail.wait(10)
        raise OSError("the line is dead")


def test_nothing_stays_after_a_fetch_that_fails_when_the_file_was_forgotten():
    file = Flaky()
    cache = make(file, ahead=1_000)
    for offset in [*range(900, -1, -100), 1_000]:  # nothing is read ahead before the last one
        read(cache, file, offset, 50)
    assert file.started.wait(10)
    storage = cache._disk._file
    assert storage is not None
    cache.forget(file)
    file.fail.set()
    settle(cache.read_ahead)
    assert storage.closed
    assert cache._made == 0


def test_memory_that_is_not_to_be_had_does_not_count(monkeypatch):
    def full(size: int) -> bytearray:
        raise MemoryError

    file = Slow()
    cache = make(file)
    with monkeypatch.context() as patch:
        patch.setattr(block_cache, "bytearray", full, raising=False)
        with pytest.raises(MemoryError):
            read(cache, file, 0, 100)
    assert cache._made == 0
    assert read(cache, file, 0, 100) == CONTENT[:100]
    cache.forget(file)
