"""Disks that are full, fail, or do less than they are asked to: a clear error, the old file, and no litter."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import ChangedInputError, MechaError, OutputError
from sd_mecha.storage import output_file
from tests.faults.support import OLD, only_file, write_model

pytestmark = pytest.mark.skipif(not hasattr(os, "pwrite"), reason="makes positional calls fail")

THREADS = pytest.mark.parametrize("threads", [0, 2])
SIZE = 24 * 4096


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    tensors = [{f"k{i:02}": torch.randn(1024, generator=generator) for i in range(24)} for _ in range(2)]
    return [write_model(tmp_path / f"{i}.safetensors", **t) for i, t in enumerate(tensors)]


@pytest.fixture
def expected(models: list[Path], tmp_path: Path) -> bytes:
    merge(models, tmp_path / "whole.safetensors", 0)
    return (tmp_path / "whole.safetensors").read_bytes()


def merge(models: list[Path], output: Path, threads: int, **options: Any) -> None:
    recipe = sd_mecha.n_average(*map(sd_mecha.model, models))
    sd_mecha.merge(recipe, output=output, threads=threads, tqdm=None, output_dtype=None, **options)


def failing_at(call: Callable[..., Any], moment: int, code: int, *, sticks: bool = True) -> Callable[..., Any]:
    """A system call that fails from its `moment`-th use on, or only then."""
    calls = [0]
    lock = threading.Lock()

    def run(*args: Any, **kwargs: Any) -> Any:
        with lock:
            calls[0] += 1
            fails = calls[0] > moment if sticks else calls[0] == moment + 1
        if fails:
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return run


class FullDisk:
    """Lets bytes be written up to some offset of a file; what crosses it is written in part, as a disk does."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pwrite = os.pwrite

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        left = self.limit - offset
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._pwrite(descriptor, view[:left], offset)


@THREADS
def test_full_at_fifty_random_offsets(
    models: list[Path], old: Path, expected: bytes, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that has room for only so much, although it said otherwise before; then somebody makes room."""
    rng = random.Random(threads)
    for number in range(50):
        resume = number % 2 == 1
        with monkeypatch.context() as patch:
            patch.setattr(output_file, "_FLUSH_SIZE", 20_000)
            patch.setattr(os, "pwrite", FullDisk(rng.randrange(len(expected))).pwrite)
            with pytest.raises(OutputError, match=r"cannot be written: No space left on device; free some space"):
                merge(models, old, threads, resume=resume)
        assert old.read_bytes() == OLD
        assert resume or only_file(old)
        merge(models, old, threads, resume=resume)
        assert old.read_bytes() == expected
        assert only_file(old)
        old.write_bytes(OLD)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_the_error_of_a_full_disk_is_that_of_the_system() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught, open("/dev/full", "wb", 0) as full:
        full.write(b"x")
    assert caught.value.errno == errno.ENOSPC


CALLS = ["pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "replace", "preadv", "open"]


@THREADS
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_may_fail_at_any_moment(
    models: list[Path], old: Path, expected: bytes, call: str, resume: bool, threads: int, monkeypatch: Any
) -> None:
    """Input/output errors of reads and writes, of syncs and renames; the error says so, and nothing else happens."""
    if not hasattr(os, call):
        pytest.skip("no such call here")
    failures = 0
    for moment in (0, 1, 3, 12, 24):
        with monkeypatch.context() as patch:
            patch.setattr(output_file, "_FLUSH_SIZE", 20_000)
            patch.setattr(os, call, failing_at(getattr(os, call), moment, errno.EIO))
            try:
                merge(models, old, threads, resume=resume)
            except (OutputError, ChangedInputError) as error:
                failure = str(error)
            else:
                failure = ""
        if failure:
            failures += 1
            assert os.strerror(errno.EIO) in failure
            assert old.read_bytes() == OLD
            assert resume or only_file(old)
        merge(models, old, threads, resume=resume)
        assert old.read_bytes() == expected
        assert only_file(old)
        old.write_bytes(OLD)
    assert failures


@THREADS
@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="no such call here")
def test_a_write_error_that_passes_is_an_error_all_the_same(
    models: list[Path], old: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sync that failed has lost, the next one does not bring back."""
    monkeypatch.setattr(output_file, "_FLUSH_SIZE", 20_000)
    for call, moment in (("pwrite", 1), ("fdatasync", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing_at(getattr(os, call), moment, errno.EIO, sticks=False))
            with pytest.raises(OutputError, match="Input/output error"):
                merge(models, old, threads)
        assert old.read_bytes() == OLD
        assert only_file(old)


@THREADS
def test_reads_and_writes_that_do_only_a_part(
    models: list[Path], old: Path, expected: bytes, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    preadv, pwrite, write = os.preadv, os.pwrite, os.write

    def part(view: memoryview) -> memoryview:
        return view[: rng.randint(1, max(1, min(len(view), 1500)))]

    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [part(views[0])], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, part(view), offset))
    monkeypatch.setattr(os, "write", lambda fd, view: write(fd, part(memoryview(view))))
    for resume in (False, True):
        merge(models, old, threads, resume=resume)
        assert old.read_bytes() == expected
        assert only_file(old)


@contextlib.contextmanager
def signals(interval: float) -> Iterator[list[int]]:
    """A signal arrives again and again, and interrupts system calls."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@THREADS
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_calls_that_signals_interrupt(models: list[Path], old: Path, expected: bytes, threads: int) -> None:
    with signals(0.0005) as seen:
        for _ in range(5):
            merge(models, old, threads, resume=True)
    assert len(seen) > 10
    assert old.read_bytes() == expected
    assert only_file(old)


def test_an_interruption_with_resume_keeps_the_work_and_says_so(
    models: list[Path], old: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, real = [0], os.pwrite

    def interrupted(*args: Any) -> int:
        calls[0] += 1
        if calls[0] == 10:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(models, old, 0, resume=True)
    assert "9 of 24 tensors are kept; run again with resume=True (--resume) to go on" in caplog.text
    assert old.read_bytes() == OLD
    calls[0] = 100
    monkeypatch.setattr(os, "pwrite", interrupted)
    merge(models, old, 0, resume=True)
    assert calls[0] - 100 == 24 - 9 + 1
    assert old.read_bytes() == expected
    assert only_file(old)


def test_a_disk_too_small_keeps_what_an_earlier_run_has_left(
    models: list[Path], old: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_at(os.pwrite, 12, errno.EIO))
        with pytest.raises(OutputError):
            merge(models, old, 0, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing_at(lambda *args: None, 0, errno.ENOSPC), raising=False)
        with pytest.raises(MechaError, match="has no room"):
            merge(models, old, 0, resume=True)
    writes = failing_at(os.pwrite, 13, errno.EIO)  # twelve tensors and the header
    monkeypatch.setattr(os, "pwrite", writes)
    merge(models, old, 0, resume=True)
    assert old.read_bytes() == expected
