"""What is complete survives an interruption, and nothing else is taken for complete."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_mecha.errors import OutputError
from sd_mecha.storage import output_file
from sd_mecha.storage.journal import sample
from sd_mecha.storage.safetensors import SafetensorsWriter
from tests.storage.support import entries_of, random_tensor, raw

TENSORS = {f"t{i}": random_tensor(torch.float32, (40 + i,), i) for i in range(6)} | {
    "big": random_tensor(torch.float16, (300_000,), 7),
    "empty": torch.empty(0, 3),
}
NAMES = list(TENSORS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def begin(path: Path, resume: str | None = "recipe", metadata: Any = None) -> SafetensorsWriter:
    writer = SafetensorsWriter(path, resume=resume)
    writer.declare(entries_of(TENSORS), {"k": "v"} if metadata is None else metadata)
    return writer


def put(writer: SafetensorsWriter, names: Iterable[str]) -> None:
    for name in names:
        writer.write(name, 0, memoryview(raw(TENSORS[name])))
        writer.finished(name)


def whole(tmp_path: Path, dropped: Iterable[str] = (), metadata: Any = None) -> bytes:
    """The file that an uninterrupted writer makes."""
    path = tmp_path / "expected" / "whole"
    path.parent.mkdir(exist_ok=True)
    writer = begin(path, None, metadata)
    put(writer, NAMES)
    for name in dropped:
        writer.drop(name)
    writer.commit()
    return path.read_bytes()


def journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.part.journal")


def files(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p.is_file())


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("dropped", [(), ("t1", "t4"), ("big",)])
def test_an_aborted_writer_is_continued(path: Path, platform: str, order: int, dropped: tuple[str, ...]) -> None:
    names = random.Random(order).sample(NAMES, len(NAMES))
    first = begin(path)
    put(first, (name for name in names[:4] if name not in dropped))
    for name in dropped:
        first.drop(name)
    first.write("t5", 0, memoryview(raw(TENSORS["t5"])[:10]))  # begun, but not finished
    first.abort()
    assert files(path) == [f".{path.name}.part", journal(path).name]

    second = begin(path)
    assert second.completed == {*names[:4], *dropped}
    assert second.dropped == set(dropped)
    put(second, set(NAMES) - second.completed)
    second.commit()
    assert path.read_bytes() == whole(path.parent, dropped)
    assert files(path) == [path.name]


def test_nothing_is_kept_without_a_fingerprint_or_a_finished_tensor(path: Path) -> None:
    for resume in (None, "recipe"):
        writer = begin(path, resume)
        writer.write("t0", 0, memoryview(raw(TENSORS["t0"])))
        assert writer.completed == frozenset()
        writer.abort()
        assert files(path) == []


def test_a_run_without_a_fingerprint_removes_what_was_kept(path: Path) -> None:
    first = begin(path)
    put(first, NAMES[:3])
    first.abort()
    second = begin(path, None)
    assert second.completed == frozenset()
    assert files(path) == [f".{path.name}.part"]
    second.abort()
    assert files(path) == []


def test_an_aborted_writer_says_how_to_go_on(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sd_mecha")
    first = begin(path)
    put(first, NAMES[:3])
    first.abort()
    assert "3 of 8 tensors are kept; run again with resume=True (--resume) to go on" in caplog.text
    second = begin(path)
    assert "going on: 3 of 8 tensors are complete" in caplog.text
    second.abort()


@pytest.mark.parametrize("change", ["fingerprint", "layout"])
def test_another_recipe_starts_afresh_and_says_so(path: Path, change: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "sd_mecha")
    first = begin(path)
    put(first, NAMES[:3])
    first.abort()
    if change == "fingerprint":
        second = begin(path, "another")
    else:
        second = begin(path, metadata={"k": "v" * 100})
    assert second.completed == frozenset()
    assert "starting afresh: the recipe, an input or an option changed" in caplog.text
    second.abort()


@pytest.mark.parametrize("damage", ["missing", "empty", "torn head", "not JSON", "a list", "another version"])
def test_a_journal_that_cannot_be_used_starts_afresh(path: Path, damage: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "sd_mecha")
    first = begin(path)
    put(first, NAMES[:3])
    first.abort()
    where = journal(path)
    lines = where.read_bytes().splitlines(keepends=True)
    if damage == "missing":
        where.unlink()
    else:
        head = {
            "empty": b"",
            "torn head": lines[0][:-5],
            "not JSON": b"\xff\n",
            "a list": b"[]\n",
            "another version": lines[0].replace(b'"version":2', b'"version":3'),
        }[damage]
        where.write_bytes(head + b"".join(lines[1:] if head.endswith(b"\n") else []))
    second = begin(path)
    assert second.completed == frozenset()
    assert "starting afresh" in caplog.text
    put(second, NAMES)
    second.commit()
    assert path.read_bytes() == whole(path.parent)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_not_written_to_its_end_counts_for_nothing(path: Path, cut: int) -> None:
    first = begin(path)
    put(first, NAMES[:3])
    first.abort()
    where = journal(path)
    where.write_bytes(where.read_bytes()[:-cut])
    second = begin(path)
    assert second.completed == {*NAMES[:2]}
    put(second, NAMES[2:4])
    second.abort()
    third = begin(path)  # what came after the torn line is read, too
    assert third.completed == {*NAMES[:4]}
    put(third, NAMES[4:])
    third.commit()
    assert path.read_bytes() == whole(path.parent)


@pytest.mark.parametrize("line", ["7", "[]", '["t5"]', '["t5", 1.5]', "{}", '[["t5"], 3]', "null"])
def test_a_line_of_another_kind_ends_the_journal(path: Path, line: str) -> None:
    first = begin(path)
    put(first, NAMES[:3])
    first.abort()
    with journal(path).open("a") as file:
        file.write(f'{line}\n["t4",null]\n')
    second = begin(path)
    assert second.completed == {*NAMES[:3]}
    second.abort()


def test_names_of_other_files_in_the_journal_are_ignored(path: Path) -> None:
    first = begin(path)
    put(first, NAMES[:1])
    first.abort()
    with journal(path).open("a") as file:
        file.write('["no such tensor",null]\n')
    second = begin(path)
    assert second.completed == {NAMES[0]}
    put(second, NAMES[1:])
    second.commit()
    assert path.read_bytes() == whole(path.parent)


@pytest.mark.parametrize("name", ["t2", "big"])
def test_a_tensor_that_is_not_what_the_journal_says_is_made_again(path: Path, name: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "sd_mecha")
    first = begin(path)
    put(first, NAMES)
    first.abort()
    part = path.with_name(f".{path.name}.part")
    at = part.read_bytes().index(raw(TENSORS[name]))
    with part.open("r+b") as file:
        file.seek(at)
        file.write(bytes(100))
    second = begin(path)
    assert second.completed == {*NAMES} - {name}
    assert f"{name!r} is made again" in caplog.text
    second.abort()
    third = begin(path)  # it does not count as complete before it is
    assert third.completed == {*NAMES} - {name}
    put(third, [name])
    third.commit()
    assert path.read_bytes() == whole(path.parent)


@pytest.mark.parametrize("size", [0, 1])
def test_a_temporary_file_that_was_cut_is_made_again(path: Path, size: int) -> None:
    first = begin(path)
    put(first, NAMES)
    first.abort()
    os.truncate(path.with_name(f".{path.name}.part"), size)
    second = begin(path)
    assert second.completed <= {"empty"}
    put(second, NAMES)
    second.commit()
    assert path.read_bytes() == whole(path.parent)


def test_the_journal_follows_the_data_to_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is in the journal only after a sync that began when all of it was written."""
    events: list[str] = []
    sync = os.fsync

    def seen(descriptor: int) -> None:
        events.append("journal" if os.fstat(descriptor).st_size < 4096 else "data")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    writer = begin(path)
    events.clear()
    put(writer, NAMES[:3])
    assert len(journal(path).read_text().splitlines()) == 1
    writer._output.sync()
    assert events == ["data", "journal"]
    assert [json.loads(line)[0] for line in journal(path).read_text().splitlines()[1:]] == NAMES[:3]
    writer.abort()


def test_work_that_takes_long_is_noted_from_time_to_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_file, "_FLUSH_SECONDS", -1.0)
    writer = begin(path)
    put(writer, NAMES[:1])
    writer._output._close()  # waits for the flush
    assert len(journal(path).read_text().splitlines()) == 2
    writer.abort()


def test_a_data_sync_that_failed_is_not_noted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begin(path)
    put(writer, NAMES[:2])
    writer._output.sync()
    put(writer, NAMES[2:])

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OutputError, match="cannot be completed: Input/output error"):
            writer.commit()
    second = begin(path)
    assert second.completed == {*NAMES[:2]}
    second.abort()


def test_a_journal_that_cannot_be_written_costs_no_merge(path: Path, monkeypatch: Any, caplog: Any) -> None:
    writer = begin(path)

    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put(writer, NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        writer._output.sync()
    assert "cannot be written: No space left on device; what is made from now on is not kept" in caplog.text
    writer.commit()
    assert path.read_bytes() == whole(path.parent)
    assert files(path) == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_journal_that_is_a_link_is_not_followed(path: Path) -> None:
    victim = path.with_name("victim")
    victim.write_bytes(b"precious")
    journal(path).symlink_to(victim)
    path.with_name(f".{path.name}.part").write_bytes(b"x")
    writer = begin(path)
    put(writer, NAMES)
    writer.commit()
    assert victim.read_bytes() == b"precious"
    assert files(path) == [path.name, "victim"]


def test_tensors_can_be_read_back_and_metadata_replaced(path: Path, platform: str) -> None:
    first = begin(path, metadata={"sum": "0" * 8})
    put(first, NAMES[:5])
    first.abort()
    writer = begin(path, metadata={"sum": "0" * 8})
    put(writer, NAMES[5:])
    for name, tensor in TENSORS.items():
        content = raw(tensor)
        buffer = bytearray(len(content) // 2)
        writer.read_back(name, len(content) - len(buffer), memoryview(buffer))
        assert buffer == content[len(content) - len(buffer) :]
    with pytest.raises(ValueError, match="outside tensor"):
        writer.read_back("t0", 0, memoryview(bytearray(1000)))
    with pytest.raises(OutputError, match=r"the header needs \d+ bytes; \d+ were reserved"):
        writer.amend({"sum": "1" * 100})
    writer.amend({"sum": "12345678"})
    writer.commit()
    assert path.read_bytes() == whole(path.parent, metadata={"sum": "12345678"})


def test_samples_see_changes_at_both_ends_and_in_between() -> None:
    data = bytearray(os.urandom(1 << 20))

    def read(start: int, view: memoryview) -> None:
        view[:] = data[start : start + len(view)]

    def found(nbytes: int = len(data)) -> int:
        return sample(read, nbytes)

    before = found()
    for at in (0, len(data) - 1, (len(data) - (16 << 10)) // 3 + 5):
        data[at] ^= 1
        assert found() != before
        data[at] ^= 1
    assert found() == before
    assert found(0) == 0
    small = found(65536)
    data[30_000] ^= 1
    assert found(65536) != small
