"""The final name leads to the old file or to the whole new one, whatever goes wrong in between."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from sd_mecha.errors import OutputError
from sd_mecha.storage import output_file
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.output_file import OutputFile

OLD = b"what was there before"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(OLD)
    return path


def write(output: OutputFile, offset: int, data: bytes) -> None:
    output.write_at(offset, memoryview(data))


def failing(code: int, after: int = 0, call=None):
    """A system call that works a few times and then fails."""
    left = [after]

    def run(*args, **kwargs):
        if not left[0]:
            raise OSError(code, os.strerror(code))
        left[0] -= 1
        return call(*args, **kwargs)

    return run


def test_old_file_stays_until_publish(path, platform):
    output = OutputFile(path)
    output.create(6)
    write(output, 3, b"def")
    write(output, 0, b"abc")
    assert path.read_bytes() == OLD
    output.publish(6)
    assert path.read_bytes() == b"abcdef"
    assert os.listdir(path.parent) == ["out.bin"]


def test_nothing_happens_before_create(tmp_path):
    output = OutputFile(tmp_path / "no" / "such" / "folder")
    output.discard()
    assert os.listdir(tmp_path) == []


def test_discard_leaves_the_old_file_alone(path, platform):
    output = OutputFile(path)
    output.create(6)
    write(output, 0, b"abc")
    output.discard()
    output.discard()
    assert os.listdir(path.parent) == ["out.bin"]
    assert path.read_bytes() == OLD


def test_discard_after_publish_keeps_the_result(path):
    output = OutputFile(path)
    output.create(1)
    write(output, 0, b"a")
    output.publish(1)
    output.discard()
    assert path.read_bytes() == b"a"


def test_space_is_reserved_and_cut(path, platform):
    output = OutputFile(path)
    output.create(1 << 20)
    (temporary,) = (p for p in path.parent.iterdir() if p != path)
    assert temporary.name.startswith(".")
    assert temporary.stat().st_size == 1 << 20
    write(output, 0, b"abc")
    output.publish(3)
    assert path.read_bytes() == b"abc"


def test_moving_down_over_itself(path, platform, monkeypatch):
    monkeypatch.setattr(output_file, "_COPY_SIZE", 7)
    data = bytes(range(100))
    output = OutputFile(path)
    output.create(105)
    write(output, 5, data)
    output.move_down(5, 0, 100)
    output.publish(100)
    assert path.read_bytes() == data


def test_short_writes_are_continued(path, platform, monkeypatch):
    pwrite, plain = os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:3], offset))
    monkeypatch.setattr(os, "write", lambda fd, view: plain(fd, view[:3]))
    output = OutputFile(path)
    output.create(100)
    write(output, 0, bytes(range(100)))
    output.publish(100)
    assert path.read_bytes() == bytes(range(100))


def test_a_write_that_never_progresses_is_an_error(path, platform, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *args: 0)
    monkeypatch.setattr(os, "write", lambda *args: 0)
    output = OutputFile(path)
    output.create(3)
    with pytest.raises(OutputError, match="no progress"):
        write(output, 0, b"abc")
    output.discard()


def test_threads_write_their_own_places(path, platform):
    output = OutputFile(path)
    output.create(4000)

    def work(index: int) -> None:
        for block in range(index, 400, 4):
            write(output, block * 10, bytes([block % 256]) * 10)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    output.publish(4000)
    assert path.read_bytes() == b"".join(bytes([block % 256]) * 10 for block in range(400))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_failing_write_names_path_and_cause(path, monkeypatch, code):
    output = OutputFile(path)
    output.create(6)
    monkeypatch.setattr(os, "pwrite", failing(code, 1, os.pwrite))
    write(output, 0, b"abc")
    with pytest.raises(OutputError) as caught:
        write(output, 3, b"def")
    assert repr(str(path)) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert caught.value.__cause__.errno == code
    output.discard()
    assert os.listdir(path.parent) == ["out.bin"]
    assert path.read_bytes() == OLD


@pytest.mark.parametrize("call", ["fsync", "replace", "ftruncate"])
def test_failing_publish_leaves_the_old_file(path, monkeypatch, call):
    output = OutputFile(path)
    output.create(3)
    write(output, 0, b"abc")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.EIO))
        with pytest.raises(OutputError, match="cannot be completed: Input/output error; check the disk"):
            output.publish(3)
    output.discard()
    assert os.listdir(path.parent) == ["out.bin"]
    assert path.read_bytes() == OLD


def test_failing_folder_sync_is_no_failure(path, monkeypatch):
    output = OutputFile(path)
    output.create(3)
    write(output, 0, b"abc")
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, 1, os.fsync))
    output.publish(3)
    assert path.read_bytes() == b"abc"


def test_full_disk_is_reported_before_the_work(path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC), raising=False)
    monkeypatch.setattr(capabilities, "fallocate", True)
    with pytest.raises(OutputError, match="has no room for 1000 bytes: No space left on device; free some"):
        OutputFile(path).create(1000)
    assert os.listdir(path.parent) == ["out.bin"]


def test_without_reservation_the_free_space_decides(path, monkeypatch):
    monkeypatch.setattr(capabilities, "fallocate", False)
    with pytest.raises(OutputError, match="No space left on device"):
        OutputFile(path).create(1 << 55)
    assert os.listdir(path.parent) == ["out.bin"]


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_system_that_cannot_reserve(path, monkeypatch, code):
    monkeypatch.setattr(os, "posix_fallocate", failing(code), raising=False)
    monkeypatch.setattr(capabilities, "fallocate", True)
    output = OutputFile(path)
    output.create(3)
    write(output, 0, b"abc")
    output.publish(3)
    assert path.read_bytes() == b"abc"


def test_missing_folder(tmp_path):
    with pytest.raises(OutputError, match=r"there is no folder '.*no'; create it"):
        OutputFile(tmp_path / "no" / "out.bin").create(1)


def test_name_that_is_a_folder(tmp_path):
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        OutputFile(tmp_path).create(1)


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no /dev/null here")
def test_name_that_is_a_device():
    with pytest.raises(OutputError, match="not a regular file"):
        OutputFile("/dev/null").create(1)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_unwritable_folder(path, monkeypatch, code):
    monkeypatch.setattr(os, "open", failing(code))
    with pytest.raises(OutputError, match=r"cannot be created: .*; check the permissions"):
        OutputFile(path).create(1)


def test_nul_in_the_name(tmp_path):
    with pytest.raises(OutputError, match="embedded null"):
        OutputFile(f"{tmp_path}/a\0b").create(1)


def test_long_and_strange_names(tmp_path):
    path = tmp_path / ("é ' \n" + "x" * 200)
    output = OutputFile(path)
    output.create(1)
    write(output, 0, b"a")
    output.publish(1)
    assert path.read_bytes() == b"a"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_link_is_followed(tmp_path, path):
    link = tmp_path / "link"
    link.symlink_to(path)
    output = OutputFile(link)
    output.create(1)
    write(output, 0, b"a")
    output.publish(1)
    assert link.is_symlink()
    assert path.read_bytes() == b"a"


@pytest.mark.skipif(os.name == "nt", reason="other permissions there")
def test_private_file_stays_private(path):
    path.chmod(0o600)
    output = OutputFile(path)
    output.create(1)
    write(output, 0, b"a")
    output.publish(1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


class TestFlushWhileWriting:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch):
        monkeypatch.setattr(output_file, "_FLUSH_SIZE", 10)
        monkeypatch.setattr(capabilities, "fdatasync", True)

    def test_runs_beside_the_writer(self, path, monkeypatch):
        flushed = threading.Event()
        monkeypatch.setattr(os, "fdatasync", lambda fd: flushed.set(), raising=False)
        output = OutputFile(path)
        output.create(20)
        write(output, 0, bytes(9))
        assert not flushed.is_set()
        write(output, 9, bytes(11))
        assert flushed.wait(10)
        output.publish(20)
        assert path.read_bytes() == bytes(20)

    def test_is_over_before_the_descriptor_is_closed(self, path, monkeypatch):
        entered, leave, seen = threading.Event(), threading.Event(), []

        def slow(descriptor: int) -> None:
            entered.set()
            leave.wait(10)
            seen.append(os.fstat(descriptor).st_size)

        monkeypatch.setattr(os, "fdatasync", slow, raising=False)
        output = OutputFile(path)
        output.create(20)
        write(output, 0, bytes(20))
        assert entered.wait(10)
        write(output, 0, bytes(20))  # neither waits for the flush nor starts a second one
        threading.Timer(0.05, leave.set).start()
        output.discard()
        assert seen == [20]

    def test_its_failure_is_not_lost(self, path, monkeypatch):
        monkeypatch.setattr(os, "fdatasync", failing(errno.EIO), raising=False)
        output = OutputFile(path)
        output.create(20)
        write(output, 0, bytes(20))
        with pytest.raises(OutputError, match="cannot be completed: Input/output error"):
            output.publish(20)
        output.discard()
        assert path.read_bytes() == OLD

    @pytest.mark.parametrize("begun", [False, True])
    def test_interrupted_while_it_begins(self, path, monkeypatch, begun):
        start, joined = threading.Thread.start, []

        def interrupted(thread: threading.Thread) -> None:
            if begun:
                start(thread)
                joined.append(thread)
            raise KeyboardInterrupt

        output = OutputFile(path)
        output.create(20)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write(output, 0, bytes(20))
        for thread in joined:
            thread.join(10)
        assert not output._flushing.locked()  # a test that waits for ever would say less
        output.discard()
        assert os.listdir(path.parent) == ["out.bin"]

    def test_no_thread_to_be_had(self, path, monkeypatch):
        def refuse(*args, **kwargs):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        output = OutputFile(path)
        output.create(20)
        write(output, 0, bytes(20))
        output.publish(20)
        assert path.read_bytes() == bytes(20)
