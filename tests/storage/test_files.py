from __future__ import annotations

import errno
import gc
import os
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha.errors import ChangedInputError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.files import DescriptorPool, RangeFile

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def file(path, platform):
    file = RangeFile(path)
    yield file
    file.close()


def read(file: RangeFile, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_any_range_reads_back(file):
    @given(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT)))
    def check(a, b):
        begin, end = sorted((a, b))
        assert read(file, begin, end - begin) == CONTENT[begin:end]

    check()
    assert file.size == len(CONTENT)


def test_buffers_of_any_format(file):
    buffer = memoryview(bytearray(24)).cast("d").cast("B").cast("I", (2, 3))
    file.read_into(8, buffer)
    assert buffer.tobytes() == CONTENT[8:32]


def test_short_reads_are_continued(file, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    assert read(file, 3, 100) == CONTENT[3:103]


def test_many_threads_read_their_own_ranges(file):
    wrong = []

    def work(seed: int) -> None:
        for step in range(200):
            offset = (seed * 131 + step * 17) % 1900
            if read(file, offset, 100) != CONTENT[offset : offset + 100]:
                wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_end_of_file_within_the_range_is_an_error(file):
    with pytest.raises(ChangedInputError, match=f"{re.escape(file.path)}: ends at byte 2048, expected 52 more"):
        read(file, 2000, 100)


def test_disk_error_names_the_file_and_place(file, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(capabilities, "preadv", True)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ChangedInputError, match=r"data\.bin: cannot be read at byte 5: Input/output error"):
        read(file, 5, 1)


def test_identity_stays_while_nothing_happens(file):
    assert file.identity() == file.identity()
    file.check_unchanged()


def test_replaced_file_is_noticed(file, path):
    other = path.with_name("other.bin")
    other.write_bytes(CONTENT)
    os.replace(other, path)
    with pytest.raises(ChangedInputError, match=r"changed while it was in use \(.*inode was"):
        file.check_unchanged()


def test_appended_file_is_noticed(file, path):
    with path.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ChangedInputError, match="size was 2048, is 2049"):
        file.check_unchanged()


def test_touched_file_is_noticed(file, path):
    os.utime(path, ns=(1, 1))
    with pytest.raises(ChangedInputError, match="mtime_ns was"):
        file.check_unchanged()


def test_removed_file_is_noticed(file, path):
    path.unlink()
    with pytest.raises(ChangedInputError, match="vanished"):
        file.check_unchanged()


def test_file_changed_while_its_descriptor_was_closed_is_noticed(tmp_path):
    pool = DescriptorPool(limit=1)
    files = []
    for name in "ab":
        (tmp_path / name).write_bytes(b"12")
        files.append(RangeFile(tmp_path / name, pool=pool))
    (tmp_path / "a").write_bytes(b"345")
    with pytest.raises(ChangedInputError, match="size was 2, is 3"):
        read(files[0], 0, 2)
    (tmp_path / "a").unlink()
    with pytest.raises(ChangedInputError, match="cannot be opened again"):
        read(files[0], 0, 2)


def test_pool_bounds_open_descriptors(tmp_path, platform):
    pool = DescriptorPool(limit=4)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    files = []
    for index in range(30):
        (tmp_path / str(index)).write_bytes(bytes([index]))
        files.append(RangeFile(tmp_path / str(index), pool=pool))
        assert len(pool) <= 4
    assert [read(file, 0, 1)[0] for file in files] == list(range(30))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    for file in files:
        file.close()
    assert len(pool) == 0
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_pool_keeps_the_most_recently_used(tmp_path):
    pool = DescriptorPool(limit=2)
    a, b, c = (tmp_path / name for name in "abc")
    for path in (a, b, c):
        path.write_bytes(b"1")
    first, second = RangeFile(a, pool=pool), RangeFile(b, pool=pool)
    read(first, 0, 1)
    third = RangeFile(c, pool=pool)  # pushes out b, used least recently
    b.unlink()
    assert read(first, 0, 1) == read(third, 0, 1) == b"1"
    with pytest.raises(ChangedInputError):
        read(second, 0, 1)


def test_descriptor_in_use_survives_eviction_and_close(tmp_path):
    pool = DescriptorPool(limit=1)
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    a = RangeFile(tmp_path / "a", pool=pool)
    handle = pool.borrow(a)
    b = RangeFile(tmp_path / "b", pool=pool)
    a.close()
    assert not handle.file.closed
    assert handle.file.read() == b"1"
    pool.give_back(handle)
    assert handle.file.closed
    b.close()


def test_reading_after_close_is_refused(file):
    file.close()
    with pytest.raises(ValueError, match="read after close"):
        read(file, 0, 1)
    file.close()


def test_forgotten_file_does_not_stay_open(path):
    pool = DescriptorPool()
    file = RangeFile(path, pool=pool)
    assert len(pool) == 1
    del file
    gc.collect()
    assert len(pool) == 0


def test_missing_file_shows_both_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        RangeFile("nope.safetensors")
    assert "model 'nope.safetensors' (resolved to" in str(caught.value)
    assert repr(str(tmp_path / "nope.safetensors")) in str(caught.value)
    with pytest.raises(ModelNotFoundError, match=r"model 'short' \(resolved to .*nope"):
        RangeFile(tmp_path / "nope", requested="short")


def test_missing_folder_is_said(tmp_path):
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        RangeFile(tmp_path / "no" / "model.safetensors")


def test_folder_is_not_a_model(tmp_path):
    with pytest.raises(ModelAccessError, match="is a folder; name a model file"):
        RangeFile(tmp_path)


def test_file_as_folder(path):
    with pytest.raises(ModelNotFoundError, match="cannot be opened: Not a directory"):
        RangeFile(path / "model.safetensors")


def test_nul_in_a_path():
    with pytest.raises(ModelNotFoundError, match="cannot be opened: embedded null"):
        RangeFile("a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelAccessError, match="not a regular file"):
        RangeFile(tmp_path / "pipe")


def test_unreadable_file(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("sd_mecha.storage.files.io.FileIO", refuse)
    with pytest.raises(ModelAccessError, match="cannot be opened: Permission denied; check its permissions"):
        RangeFile(path)
