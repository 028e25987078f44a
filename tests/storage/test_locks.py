"""One temporary file for each output, written by one merge at a time, and leftovers told from work in progress."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sd_mecha.errors import OutputError
from sd_mecha.storage import locks
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.locks import Held, claim, part_name
from sd_mecha.storage.output_file import OutputFile

needs_locks = pytest.mark.skipif(not capabilities.flock, reason="no locks here")
posix = pytest.mark.skipif(os.name == "nt", reason="links, pipes and modes of POSIX")


@pytest.mark.parametrize("name", ["a", "x" * 120, "x" * 121, "x" * 255, "é" * 127, "日" * 85, "a\n b'"])
def test_names_are_short_enough_and_tell_outputs_apart(name: str) -> None:
    part = part_name(name)
    assert part.startswith(".")
    assert part.endswith(".part")
    assert len(os.fsencode(part + ".journal")) <= 143
    assert part != part_name(name + "y")
    assert part == part_name(name)


@posix
def test_a_name_that_is_no_text() -> None:
    name = os.fsdecode(b"\xff" * 200)
    assert part_name(name) != part_name(name + "x")


@needs_locks
def test_a_second_writer_is_refused_and_the_first_unharmed(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    first, second = OutputFile(path), OutputFile(path)
    first.create(3)
    first.write_at(0, memoryview(b"abc"))
    with pytest.raises(OutputError, match=r"another merge is writing to it; wait for it, or choose another name"):
        second.create(5)
    second.discard()
    first.publish(3)
    assert path.read_bytes() == b"abc"
    assert os.listdir(tmp_path) == ["out.bin"]
    second.create(1)
    second.discard()


@needs_locks
@posix
def test_a_link_to_the_same_output_is_the_same_output(tmp_path: Path) -> None:
    (tmp_path / "out.bin").write_bytes(b"old")
    (tmp_path / "link").symlink_to("out.bin")
    first = OutputFile(tmp_path / "out.bin")
    first.create(1)
    with pytest.raises(OutputError, match="another merge"):
        OutputFile(tmp_path / "link").create(1)
    first.discard()


CHILD = """
import sys
from sd_mecha.storage.output_file import OutputFile
output = OutputFile(sys.argv[1])
output.create(1 << 20)
print("locked", flush=True)
sys.stdin.readline()
"""


@needs_locks
def test_the_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    command = [sys.executable, "-c", CHILD, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match="another merge"):
            OutputFile(path).create(1)
        assert os.listdir(tmp_path) == [".out.bin.part"]
        child.kill()
        child.communicate()
    output = OutputFile(path)
    assert output.create(1) is False
    output.publish(1)
    assert os.listdir(tmp_path) == ["out.bin"]


def test_leftovers_are_removed_by_the_next_run(tmp_path: Path, platform: str) -> None:
    path = tmp_path / "out.bin"
    (tmp_path / ".out.bin.part").write_bytes(b"left by a killed run" * 1000)
    (tmp_path / ".out.bin.part.journal").write_bytes(b"this, too")
    output = OutputFile(path)
    assert output.create(3) is False
    assert sorted(os.listdir(tmp_path)) == [".out.bin.part"]
    output.publish(3)
    assert path.read_bytes() == bytes(3)
    assert os.listdir(tmp_path) == ["out.bin"]


def test_a_stray_journal_is_removed(tmp_path: Path, platform: str) -> None:
    (tmp_path / ".out.bin.part.journal").write_bytes(b"its temporary file got its final name")
    output = OutputFile(tmp_path / "out.bin")
    output.create(1)
    output.publish(1)
    assert os.listdir(tmp_path) == ["out.bin"]


def test_a_leftover_is_continued_only_if_it_is_worth_it(tmp_path: Path, platform: str) -> None:
    part = tmp_path / ".out.bin.part"
    for keep in (True, False):
        part.write_bytes(b"abc")
        output = OutputFile(tmp_path / "out.bin")
        assert output.create(3, lambda: keep) is keep  # noqa: B023
        assert part.read_bytes() == (b"abc" if keep else bytes(3))
        output.release()
        output.discard()
        assert part.exists()


@posix
def test_a_leftover_of_unclear_origin_is_not_continued(tmp_path: Path) -> None:
    """A file with a second name may be somebody's: nothing is written into it."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"abc")
    os.link(mine, tmp_path / ".out.bin.part")
    output = OutputFile(tmp_path / "out.bin")
    assert output.create(3, lambda: True) is False
    output.write_at(0, memoryview(b"xyz"))
    output.publish(3)
    assert mine.read_bytes() == b"abc"


@posix
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_what_is_no_file_under_the_temporary_name_is_refused(tmp_path: Path, kind: str) -> None:
    victim, part = tmp_path / "victim", tmp_path / ".out.bin.part"
    victim.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(victim if kind == "link" else tmp_path / "nothing")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputError, match=r"\.out\.bin\.part' leads to something else than a file; move that"):
        OutputFile(tmp_path / "out.bin").create(3)
    assert victim.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == before


@posix
def test_an_output_that_may_not_be_written_leaves_a_leftover_that_may(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    path.chmod(0o444)
    killed = OutputFile(path)
    killed.create(1)
    assert stat.S_IMODE((tmp_path / ".out.bin.part").stat().st_mode) == 0o644
    killed.release()
    output = OutputFile(path)
    output.create(1)
    output.publish(1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


@needs_locks
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sd_mecha")

    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    if os.name == "nt":
        pytest.skip("locks of POSIX")
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    output = OutputFile(tmp_path / "out.bin")
    output.create(1)
    output.publish(1)
    assert os.listdir(tmp_path) == ["out.bin"]
    assert "going on without a lock" in caplog.text


@posix
def test_without_locks_a_file_that_was_taken_away_is_not_published(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(capabilities, "flock", False)
    first, second = OutputFile(tmp_path / "out.bin"), OutputFile(tmp_path / "out.bin")
    first.create(3)
    second.create(5)
    with pytest.raises(OutputError, match="was removed or replaced"):
        first.publish(3)
    first.discard()
    second.publish(5)
    assert (tmp_path / "out.bin").read_bytes() == bytes(5)
    assert os.listdir(tmp_path) == ["out.bin"]


@needs_locks
def test_many_at_once_have_it_one_after_the_other(tmp_path: Path) -> None:
    """Whoever gets in writes a whole file; the others are told, and nothing else happens to them."""
    path, errors, wins = tmp_path / "out.bin", [], []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for _ in range(20):
            output = OutputFile(path)
            try:
                output.create(1000)
                output.write_at(0, memoryview(bytes([number]) * 1000))
                output.publish(1000)
                wins.append(number)
            except OutputError as error:
                if not isinstance(error.__cause__, Held):
                    errors.append(error)
            finally:
                output.discard()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert wins
    content = path.read_bytes()
    assert content == content[:1] * 1000
    assert os.listdir(tmp_path) == ["out.bin"]


@needs_locks
def test_a_claim_is_renewed_when_the_file_was_published_meanwhile(tmp_path: Path, monkeypatch: Any) -> None:
    path = os.fspath(tmp_path / ".out.bin.part")
    Path(path).write_bytes(b"the other one")
    real, calls = locks.try_lock, []

    def published_first(descriptor: int) -> bool:
        if not calls:
            os.replace(path, tmp_path / "out.bin")
        calls.append(descriptor)
        return real(descriptor)

    if os.name == "nt":
        pytest.skip("renames an open file")
    monkeypatch.setattr(locks, "try_lock", published_first)
    descriptor, kept = claim(path, lambda: True)
    os.write(descriptor, b"mine")
    os.close(descriptor)
    assert not kept
    assert len(calls) == 2
    assert (tmp_path / "out.bin").read_bytes() == b"the other one"
    assert Path(path).read_bytes() == b"mine"


@pytest.mark.parametrize("call", ["open", "fstat"])
def test_an_interruption_right_after_the_file_was_made_leaves_none(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*arguments)
        if calls == 1:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(os, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            claim(str(tmp_path / ".out.part"))
    assert calls > 1
    assert os.listdir(tmp_path) == []


@needs_locks
@posix
def test_a_file_that_was_taken_for_an_empty_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / ".out.part")
    real = locks.try_lock
    others: list[int] = []

    def another_comes_first(descriptor: int) -> bool:
        if not others:
            others.append(os.open(path, os.O_RDWR))
            assert real(others[0])
        return real(descriptor)

    def another_removes_it(seconds: float) -> None:
        locks.remove(path, others[0])

    monkeypatch.setattr(locks, "try_lock", another_comes_first)
    monkeypatch.setattr(locks.time, "sleep", another_removes_it)
    descriptor, is_leftover = claim(path)
    assert not is_leftover
    assert locks.leads_to(path, descriptor)
    os.close(descriptor)
