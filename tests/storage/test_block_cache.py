from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
import time
import weakref

import pytest

from sd_mecha.storage.remote import spill_file
from sd_mecha.storage.remote.read_ahead import ReadAhead
from tests.storage.slow_files import CONTENT, Slow, make, read, settle


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("ahead", [0, 3000])
@pytest.mark.parametrize("memory", [0, 3, 60])
@pytest.mark.parametrize("slots", [1, 40, 400])
def test_any_range_reads_back(ahead, memory, slots):
    a, b = Slow(), Slow(CONTENT[::-1][:9_950])
    cache = make(a, b, ahead=ahead, memory=memory, slots=slots)
    chance = random.Random(1)
    for _ in range(300):
        file = chance.choice([a, b])
        offset = chance.randrange(file.size)
        length = chance.randrange(min(2_500, file.size - offset) + 1)
        assert read(cache, file, offset, length) == file.content[offset : offset + length]
    settle(cache.read_ahead)
    cache.forget(a)
    cache.forget(b)


def test_only_touched_chunks_are_fetched_and_only_once():
    file = Slow()
    cache = make(file, slots=100)
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
    cache = make(file, slots=2, memory=1, per_file=0)
    for offset in (0, 1_000, 2_000, 0, 3_000):  # the block at 1000 goes
        read(cache, file, offset, 10)
    file.fetched.clear()
    for offset in (0, 2_000, 3_000):
        read(cache, file, offset, 10)
    assert file.fetched == []
    read(cache, file, 1_000, 10)
    assert file.fetched == [(1_000, 1_100)]
    cache.forget(file)


def test_what_is_read_once_as_a_whole_never_touches_the_disk(monkeypatch):
    stored: list[int] = []
    store = spill_file.SpillFile.store
    monkeypatch.setattr(
        spill_file.SpillFile, "store", lambda *arguments: (stored.append(arguments[1]), store(*arguments))[1]
    )
    file = Slow()
    cache = make(file, memory=30, ahead=1_000)
    for offset in range(0, 10_000, 40):
        assert read(cache, file, offset, 40) == CONTENT[offset : offset + 40]
    settle(cache.read_ahead)
    assert file.total == 10_000
    assert stored == []
    assert read(cache, file, 500, 5_000) == CONTENT[500:5_500], "it is fetched once more"
    assert file.total > 14_000
    cache.forget(file)


def test_what_was_not_read_as_a_whole_goes_to_disk_and_comes_back():
    file = Slow()
    cache = make(file, slots=90, memory=3)
    for start in (0, 60):
        for offset in range(start, 9_000, 100):
            assert read(cache, file, offset, 40) == CONTENT[offset : offset + 40]
    assert file.total == 9_000
    assert len(cache._spare) <= 3
    assert cache._made <= 3
    cache.forget(file)


def test_room_is_not_given_away_while_a_forgotten_file_is_read_from_disk(monkeypatch):
    file, other = Slow(), Slow(CONTENT[::-1])
    cache = make(file, slots=10, memory=1, per_file=0)
    for offset in (0, 1_000, 2_000):
        read(cache, file, offset, 50)
    reading, go = threading.Event(), threading.Event()
    load = spill_file.SpillFile.load

    def slow(*arguments: object) -> bool:
        reading.set()
        assert go.wait(10)
        return load(*arguments)

    monkeypatch.setattr(spill_file.SpillFile, "load", slow)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(read(cache, file, 0, 50)))
    thread.start()
    assert reading.wait(10)
    cache.forget(file)
    cache.add(other)
    for offset in range(0, 5_000, 100):
        read(cache, other, offset, 50)
    count = len(file.fetched)
    go.set()
    thread.join()
    assert got == [CONTENT[:50]]
    assert len(file.fetched) == count, "it came from the disk"
    for offset in range(0, 5_000, 100):
        assert read(cache, other, offset + 50, 50) == other.content[offset + 50 : offset + 100]
    storage = cache._disk._file
    assert storage is not None
    cache.forget(other)
    assert storage.closed
    assert (cache._made, cache._free, cache._orphans) == (0, [], set())


def test_a_second_pass_is_read_ahead_too():
    file = Slow()
    cache = make(file, memory=30, ahead=1_000)
    counts = []
    for _ in range(2):
        for offset in range(0, 10_000, 100):
            assert read(cache, file, offset, 100) == CONTENT[offset : offset + 100]
            settle(cache.read_ahead)
        counts.append(len(file.fetched))
    assert file.total == 20_000
    assert counts[1] < 2 * counts[0] + 3
    assert counts[0] < 30
    cache.forget(file)


def test_the_temporary_file_is_bounded_and_has_no_name_and_goes_with_the_last_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    files = [Slow(), Slow()]
    cache = make(*files, slots=30)
    for file in files:
        for offset in range(0, 10_000, 100):
            read(cache, file, offset, 99)
    storage = cache._disk._file
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
    cache = make(*files, slots=40, per_file=20)
    assert cache.slots == 200
    for start in (0, 1):
        for file in files:
            for offset in range(4_500, 5_500, 100):
                assert read(cache, file, offset + start, 99) == CONTENT[offset + start : offset + start + 99]
    assert all(file.total == 1_000 for file in files)
    for file in files:
        cache.forget(file)
    assert cache.slots == 40


def test_concurrent_readers_wait_for_one_fetch():
    file = Slow()
    cache = make(file, slots=100)
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
    cache = make(file, ahead=4_000, slots=200)
    for offset in (5_000, 200, 9_000, 3_000):
        read(cache, file, offset, 100)
    settle(cache.read_ahead)
    assert file.total == 400
    for offset in range(3_100, 4_000, 100):
        read(cache, file, offset, 100)
        settle(cache.read_ahead)
    assert file.total > 400 + 900, "something was fetched ahead"
    assert file.total <= 400 + 2 * 1_000 + 100, "but no more than was read in a row"
    file.fetched.clear()
    for offset in range(4_000, 10_000, 100):
        assert read(cache, file, offset, 100) == CONTENT[offset : offset + 100]
        settle(cache.read_ahead)
    assert len(file.fetched) < 20, "large ranges are fetched, not chunk by chunk"
    assert file.total <= 6_000
    cache.forget(file)


def test_the_blocks_of_a_long_range_are_fetched_side_by_side():
    file = Slow()
    cache = make(file, ahead=4_000, slots=200)
    file.go.clear()
    thread = threading.Thread(target=read, args=(cache, file, 0, 4_000))
    thread.start()
    deadline = time.monotonic() + 10
    while len(file.fetched) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(file.fetched) == [(0, 1_000), (1_000, 2_000), (2_000, 3_000), (3_000, 4_000)]
    file.go.set()
    thread.join()
    settle(cache.read_ahead)
    cache.forget(file)


def test_a_full_disk_is_no_failure(monkeypatch, caplog):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = Slow()
    cache = make(file)
    monkeypatch.setattr(os, "pwrite", full)
    for offset in (0, 50, 3_990):
        assert read(cache, file, offset, 100) == CONTENT[offset : offset + 100]
    expected = "no room on disk for reading remote files ahead ([Errno 28] No space left on device)"
    assert [record.message for record in caplog.records] == [f"{expected}; only memory is used for it"]
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
    cache = make(file, slots=20)
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
        assert read(cache, other, offset, 100) == CONTENT[offset : offset + 100], "its memory is not taken over"
    file.go.set()
    thread.join()
    assert got == [CONTENT[:100]]
    cache.forget(other)


def test_the_folder_is_the_one_that_was_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert spill_file.cache_folder() is None
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert spill_file.cache_folder() in (None, "/var/tmp")


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
    settle(queue)
    assert done in ([3, 4], [2, 3, 4])
    reference = weakref.ref(owner)
    del owner
    assert reference() is None, "nothing holds on to files"


def test_threads_stay_until_they_are_dismissed():
    queue = ReadAhead(2)
    seen: list[threading.Thread] = []
    for number in range(2):
        queue.submit(seen, number, lambda: seen.append(threading.current_thread()))
        settle(queue)
    assert seen[0] is seen[1], "the thread that had nothing to do is used again"
    queue.dismiss()
    seen[0].join(10)
    assert not seen[0].is_alive()
    queue.submit(seen, 2, lambda: seen.append(threading.current_thread()))
    settle(queue)
    assert len(seen) == 3
    queue.dismiss()
