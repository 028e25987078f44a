"""Tensors move when gaps close; an interruption meanwhile costs no more than what was on its way."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from sd_mecha.errors import OutputError
from sd_mecha.storage import output_file, placed_writer
from sd_mecha.storage.safetensors import SafetensorsWriter
from tests.storage.support import entries_of, raw
from tests.storage.test_journal import NAMES, TENSORS, begin, files, journal, put, whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


class Killed(BaseException):
    """Ends a writer as a signal would: nothing is cleaned up."""


@pytest.mark.parametrize("step", range(14))
@pytest.mark.parametrize("dropped", [("t0",), ("t1", "t4"), ("big", "t2"), ()])
def test_killed_at_any_write_of_the_commit(
    path: Path, step: int, dropped: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing gaps moves tensors: what may be in between then does not count as complete, and nothing else is lost."""
    monkeypatch.setattr(output_file, "_COPY_SIZE", 100_000)
    monkeypatch.setattr(placed_writer, "_GROUP_SIZE", 400)
    first = begin(path)
    put(first, [name for name in NAMES if name not in dropped])
    for name in dropped:
        first.drop(name)
    first._output.sync()
    calls, real = [0], os.pwrite

    def die(descriptor: int, view: memoryview, offset: int) -> int:
        calls[0] += 1
        if calls[0] > step:
            real(descriptor, view[: len(view) // 2], offset)
            raise Killed
        return real(descriptor, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", die)
        patch.setattr(SafetensorsWriter, "abort", lambda self: None)
        patch.setattr(output_file.OutputFile, "publish", lambda *args: 1 / 0)
        with pytest.raises((Killed, ZeroDivisionError)) as caught:
            first.commit()
    first._output.release()

    second = begin(path)
    lost = {*NAMES} - second.completed
    assert not lost & {*dropped}
    assert sum(len(raw(TENSORS[name])) for name in lost) <= 400 or len(lost) == 1
    assert not lost or caught.type is Killed
    put(second, lost)
    second.commit()
    assert path.read_bytes() == whole(path.parent, dropped)
    assert files(path) == [path.name]


@pytest.mark.parametrize("order", range(8))
def test_more_may_be_left_out_after_each_of_many_interruptions(
    path: Path, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that have moved, move again; what was not moved then lies where it lay."""
    monkeypatch.setattr(placed_writer, "_GROUP_SIZE", 400)
    rng, real, left = random.Random(order), os.pwrite, 0
    dropped: set[str] = set()

    def die(descriptor: int, view: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            real(descriptor, view[: len(view) // 2], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, view, offset)

    for _ in range(5):
        writer = begin(path)
        missing = {*NAMES} - writer.completed
        said = {name for name in sorted(missing) if rng.random() < 0.5}  # the others are complete, too
        put(writer, said)
        for name in missing - said:
            writer.write(name, 0, memoryview(raw(TENSORS[name])))
        dropped.add(rng.choice(NAMES[:-2]))
        for name in dropped:
            writer.drop(name)
        left = rng.randrange(12)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", die)
            patch.setattr(os, "replace", lambda *args: os.rename(path, path))  # nothing gets its name
            with pytest.raises(OutputError):
                writer.commit()
    writer = begin(path)
    put(writer, {*NAMES} - writer.completed)
    writer.commit()
    assert path.read_bytes() == whole(path.parent, dropped)


@pytest.mark.parametrize("dropped", ["t0", "big"])
def test_making_again_what_is_missing_leaves_the_others_alone(
    path: Path, dropped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes a tensor makes others, too: one that is left out, and whose place is taken, and complete ones."""
    first = begin(path)
    put(first, [name for name in NAMES if name != dropped])
    first.drop(dropped)
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "abort", lambda self: None)
        patch.setattr(output_file.OutputFile, "publish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            first.commit()
    first._output.release()
    with journal(path).open("a") as file:
        file.write('["t3",false]\n')

    second = begin(path)
    assert second.completed == {*NAMES} - {"t3"}
    for name in NAMES:
        second.write(name, 0, memoryview(raw(TENSORS[name] if name == "t3" else TENSORS[name] + 1)))
        second.finished(name)
    with pytest.raises(KeyError):
        second.read_back(dropped, 0, memoryview(bytearray(8)))
    second.commit()
    assert path.read_bytes() == whole(path.parent, [dropped])


def test_what_was_being_moved_is_made_again_whatever_its_sample_says(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a sample looks, this tensor is the same at its old and at its new place, and in a mixture of both."""
    monkeypatch.setattr(output_file, "_COPY_SIZE", 300_000)
    tensor = torch.zeros(300_000)
    tensor[60_000:61_000] = torch.arange(1000)
    entries = entries_of({"dropped": torch.zeros(100), "kept": tensor})

    def begun() -> SafetensorsWriter:
        writer = SafetensorsWriter(path, resume="recipe")
        writer.declare(entries, {})
        return writer

    writer = begun()
    writer.write("kept", 0, memoryview(raw(tensor)))
    writer.finished("kept")
    writer.drop("dropped")
    real, moved = os.pwrite, False

    def die(descriptor: int, view: memoryview, offset: int) -> int:
        nonlocal moved
        if moved:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        moved = True
        return real(descriptor, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", die)
        with pytest.raises(OutputError):
            writer.commit()
    assert moved
    writer = begun()
    assert writer.completed == {"dropped"}
    writer.write("kept", 0, memoryview(raw(tensor)))
    writer.commit()
    assert raw(tensor) in path.read_bytes()
