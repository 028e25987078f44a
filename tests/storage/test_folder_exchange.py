"""A new folder takes the place of the old one: whatever comes between, the name leads to one, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_mecha.errors import OutputError
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.folders import output_folder
from sd_mecha.storage.folders.output_folder import OutputFolder
from sd_mecha.storage.folders.sharded_writer import ShardedWriter
from sd_mecha.storage.folders.trees import carry
from tests.storage.folder_support import contents, modes, nothing, unprivileged, weights


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)
    real: Callable[[str], Any] = os.scandir

    def refuse(path: str = ".") -> Any:
        if os.path.basename(path) == "sub":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path)

    output = OutputFolder(old)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(OutputError, match=r"cannot be created: '.*sub' cannot be listed"):
            output.create()
    output.create()
    output.put("config.json", b"new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(OutputError, match=r"cannot be completed: '.*sub' cannot be listed"):
            output.publish(nothing)
    output.discard()
    assert contents(old) == before
    assert os.listdir(old.parent) == ["model"]


class Late:
    """Stands for `carry`; somebody writes into the old folder when it has run for the first time."""

    def __init__(self, old: Path, *, fails: bool = False) -> None:
        self._old, self._fails = old, fails
        self._runs = 0

    def __call__(self, *args: Any) -> None:
        self._runs += 1
        if self._runs > 1 and self._fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        carry(*args)
        if self._runs == 1:
            (self._old / "sub" / "late.txt").write_bytes(b"late")
            (self._old / "model.safetensors").write_bytes(b"of the old weights")


@pytest.mark.usefixtures("ways")
def test_what_appears_in_the_old_folder_at_the_last_moment_comes_along(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "carry", Late(old))
    output = OutputFolder(old)
    output.create()
    output.put("config.json", b"new")
    output.publish(weights)
    assert contents(old)["sub/late.txt"] == b"late"
    assert contents(old)["config.json"] == b"new"
    assert "model.safetensors" not in contents(old)
    assert os.listdir(old.parent) == ["model"]


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("gone", [False, True])
def test_the_run_after_one_that_was_killed_takes_along_what_appeared_in_the_old_folder(
    old: Path, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = OutputFolder(old)
    output.create()
    output.put("config.json", b"new")
    with monkeypatch.context() as patch:  # killed after it gave the new folder its name
        patch.setattr(output_folder, "carry", Late(old))
        patch.setattr(output, "_clean_up", lambda replaced: output.release())
        output.publish(weights)
    assert "sub/late.txt" not in contents(old)
    if gone:
        shutil.rmtree(old)
    output.create()
    output.discard()
    found = contents(old)
    assert found["sub/late.txt"] == b"late"
    assert (found["config.json"] == b"new") != gone
    assert ("model.safetensors" in found) == gone
    assert os.listdir(old.parent) == ["model"]


@pytest.mark.usefixtures("ways")
def test_an_old_folder_of_which_something_could_not_come_along_stays(
    old: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(output_folder, "carry", Late(old, fails=True))
    output = OutputFolder(old)
    output.create()
    output.put("config.json", b"new")
    output.publish(weights)
    monkeypatch.undo()
    assert contents(old)["config.json"] == b"new"
    (left,) = set(os.listdir(old.parent)) - {"model"}
    assert left in caplog.text
    assert contents(old.parent / left)["sub/late.txt"] == b"late"
    with contextlib.suppress(OutputError):  # refused where it has the temporary name
        output.create()
    output.discard()
    assert contents(old.parent / left)["sub/late.txt"] == b"late"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(errno.EPERM, "lost")])
@pytest.mark.parametrize("fails", [1, 2, "exchange", "new"])
def test_an_interruption_that_comes_after_a_rename_leaves_a_whole_folder_under_the_name(
    old: Path, monkeypatch: pytest.MonkeyPatch, fails: int | str, error: BaseException
) -> None:
    if fails == "exchange" and not capabilities.exchange:
        pytest.skip("no such call here")
    monkeypatch.setattr(capabilities, "exchange", fails == "exchange")
    target = old.parent / "new" if fails == "new" else old
    before = contents(old)
    output = OutputFolder(target)
    output.create()
    output.put("config.json", b"new")
    where, name = (output_folder, "_exchange") if fails == "exchange" else (os, "rename")
    real: Callable[[str, str], Any] = getattr(where, name)
    calls = 0

    def interrupted(one: str, other: str) -> Any:
        nonlocal calls
        calls += 1
        result = real(one, other)
        if calls == (2 if fails == 2 else 1):
            raise error
        return result

    monkeypatch.setattr(where, name, interrupted)
    if fails == 1 or isinstance(error, KeyboardInterrupt):
        with pytest.raises((KeyboardInterrupt, OutputError)):
            output.publish(nothing)
    else:
        output.publish(nothing)  # it has its name, whatever the system says
    output.discard()
    after = {"config.json": b"new"}
    assert contents(target) == (before if fails == 1 else after if fails == "new" else {**before, **after})
    assert sorted(os.listdir(old.parent)) == sorted({"model", target.name})


@pytest.mark.parametrize("fails", [1, 2])
def test_the_old_folder_is_put_back_when_the_new_one_cannot_be_named(
    old: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    monkeypatch.setattr(capabilities, "exchange", False)
    before = contents(old)
    output = OutputFolder(old)
    output.create()
    output.put("config.json", b"new")
    rename: Callable[[str, str], None] = os.rename
    calls = 0

    def failing(source: str, target: str) -> None:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise PermissionError(13, "denied")
        rename(source, target)

    monkeypatch.setattr(output_folder.os, "rename", failing)
    with pytest.raises(OutputError, match="cannot be completed: denied"):
        output.publish(nothing)
    output.discard()
    assert contents(old) == before
    assert os.listdir(old.parent) == ["model"]


def test_files_are_copied_where_they_cannot_have_two_names(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(output_folder.os, "link", refuse)
    output = OutputFolder(old)
    output.create()
    output.publish(weights)
    assert contents(old)["sub/deep.txt"] == b"deep"
    assert "model.safetensors" not in contents(old)


posix = pytest.mark.skipif(os.name != "posix", reason="needs permissions")


def replace(path: Path) -> None:
    output = OutputFolder(path)
    output.create()
    output.put("sub/config.json", b"new")
    output.publish(nothing)


@posix
@pytest.mark.usefixtures("ways")
def test_an_old_folder_that_forbids_to_write_goes_and_its_successor_forbids_it_too() -> None:
    with unprivileged() as folder:
        for name in ("model", ".model.part"):  # as an earlier release has left it
            (folder / name / "sub").mkdir(parents=True)
            for file in ("config.json", "sub/config.json"):
                (folder / name / file).write_bytes(b"old")
            for path in (folder / name / "sub", folder / name):
                path.chmod(0o555)
        inode = (folder / "model").stat().st_ino
        (folder / ".model.part.lock").write_bytes(b"swap    %20d" % inode)
        for _ in range(2):
            replace(folder / "model")
            assert os.listdir(folder) == ["model"]
            found = modes(folder / "model")
            assert found == {".": 0o555, "config.json": 0o644, "sub": 0o755, "sub/config.json": 0o644}
        (folder / "model").chmod(0o755)


@posix
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("number", [0, 3])
def test_what_is_private_is_so_all_the_time(old: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    private = {"config.json": 0o600, "model.safetensors": 0o440, "sub": 0o711, "sub/deep.txt": 0o400}
    for name, mode in private.items():
        (old / name).chmod(mode)
    old.chmod(0o550)
    tensors = {f"k{i}": TensorEntry((8,), torch.uint8) for i in range(max(number, 1))}
    part = old.parent / ".model.part"

    def write(*, killed: bool) -> None:
        writer = ShardedWriter(old, shard_size=8, resume="r", side_files=lambda entries: [
            ("config.json", b"new"), ("sub/deep.txt", b"new"), ("sub/more.txt", b"new"),
        ])  # fmt: skip
        writer.declare(tensors, {})
        found = modes(part)
        assert found["."] == 0o750
        assert {name: mode for name, mode in found.items() if name in private and name != "sub"} == {
            "config.json": 0o600, "sub/deep.txt": 0o600, **({} if number else {"model.safetensors": 0o640}),
        }  # fmt: skip
        for name in tensors.keys() - writer.completed:
            writer.write(name, 0, memoryview(b"12345678"))
            writer.finished(name)
        with monkeypatch.context() as patch, pytest.raises(OutputError) if killed else contextlib.nullcontext():
            if killed:
                patch.setattr(output_folder, "sync_tree", refuse)
            writer.commit()

    def refuse(path: str) -> None:
        if path == str(part) and not (part / "notes.txt").exists():
            return  # while it is made
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write(killed=True)
    write(killed=False)
    found = modes(old)
    assert found["."] == 0o550
    assert {name: mode for name, mode in found.items() if name in private} == {
        name: mode for name, mode in private.items() if not number or name != "model.safetensors"
    }
    assert found["sub/more.txt"] == found["notes.txt"] == 0o644
    assert os.listdir(old.parent) == ["model"]


@posix
def test_a_folder_does_not_get_the_permissions_of_a_file(old: Path) -> None:
    (old / "a").write_bytes(b"old")
    output = OutputFolder(old)
    output.create()
    output.put("a/x", b"new")
    output.publish(nothing)
    assert modes(old)["a"] & 0o700 == 0o700


@posix
def test_a_merge_goes_on_with_files_that_forbid_to_write() -> None:
    with unprivileged() as folder:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_bytes(b"old")
        (folder / ".model.part").mkdir()
        (folder / ".model.part" / "kept").write_bytes(b"1")
        (folder / ".model.part" / "kept").chmod(0o444)
        (folder / ".model.part.lock").write_bytes(b"part    ")
        output = OutputFolder(folder / "model")
        output.create(keep=["kept"])
        assert modes(folder / ".model.part") == {".": 0o755, "kept": 0o644}
        output.discard()
