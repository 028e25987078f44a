"""The journal and its file vanish and change in an order that no interruption can turn into a fault."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_mecha.storage import journal as journal_module
from sd_mecha.storage import output_file
from sd_mecha.storage.safetensors import SafetensorsWriter
from tests.storage.support import entries_of
from tests.storage.test_journal import NAMES, begin, files, journal, put, whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


@pytest.mark.parametrize("resume", [None, "recipe", "another"])
def test_no_journal_outlives_the_file_that_it_is_about(
    path: Path, resume: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is killed between making its own file and filling it; a sample of that would look like the old one."""
    entries = entries_of({"zeros": torch.zeros(50_000)})

    def begun(resume: str | None) -> SafetensorsWriter:
        writer = SafetensorsWriter(path, resume=resume)
        writer.declare(entries, {})
        return writer

    first = begun("recipe")
    first.write("zeros", 0, memoryview(bytes(200_000)))
    first.finished("zeros")
    first.abort()
    part, old, synced = path.with_name(f".{path.name}.part"), journal(path).read_bytes(), []
    real = output_file.sync_folder

    def sync(folder: str) -> None:
        synced.append(not journal(path).exists() and part.stat().st_size == 0)
        real(folder)

    if resume == "recipe":
        part.unlink()
    monkeypatch.setattr(output_file, "sync_folder", sync)
    begun(resume).abort()
    assert synced[0]  # the old journal was gone for good before the new file was more than empty

    part.write_bytes(b"")
    journal(path).write_bytes(old)
    last = begun("recipe")
    assert last.completed == frozenset()
    last.abort()


def test_the_journal_is_there_until_the_new_name_lasts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begin(path)
    put(writer, NAMES)
    seen = []
    monkeypatch.setattr(output_file, "sync_folder", lambda folder: seen.append(journal(path).exists()))
    writer.commit()
    assert seen == [True]
    assert files(path) == [path.name]


def test_a_journal_that_cannot_be_struck_from_is_gone_for_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begin(path)
    put(writer, NAMES[:1])
    writer._output.sync()
    seen = []
    monkeypatch.setattr(journal_module, "sync_folder", lambda folder: seen.append((folder, journal(path).exists())))

    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    writer._revoke(NAMES[:1])
    assert seen == [(str(path.parent), False)]
    writer.abort()


@pytest.mark.parametrize("at", ["data", "journal"])
def test_what_waits_for_the_journal_survives_an_interrupted_sync(
    path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, hit = os.fsync, []

    def sync(descriptor: int) -> None:
        if not hit and at == ("journal" if os.fstat(descriptor).st_size < 4096 else "data"):
            hit.append(descriptor)
            raise KeyboardInterrupt
        real(descriptor)

    writer = begin(path)
    put(writer, NAMES)
    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(KeyboardInterrupt):
        writer.commit()
    assert hit
    second = begin(path)
    assert second.completed == {*NAMES}
    second.commit()
    assert path.read_bytes() == whole(path.parent)


def test_interrupted_when_the_file_has_its_name(path: Path, monkeypatch: Any, caplog: Any) -> None:
    real = os.replace

    def replace(source: str, target: str) -> None:
        real(source, target)
        raise KeyboardInterrupt

    writer = begin(path)
    put(writer, NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            writer.commit()
    assert path.read_bytes() == whole(path.parent)
    assert "run again" not in caplog.text
