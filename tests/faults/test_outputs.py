"""Outputs: the old file or the whole new one, whatever goes wrong, and nothing else in the folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import ChangedInputError, OutputError, OutputFolderError, ShapeError
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method
from sd_mecha.storage import capabilities as platform
from tests.faults.support import OLD, failing, many, only_file, read, refused, write_model

THREADS = pytest.mark.parametrize("threads", [0, 4])


def average(*paths: Path) -> Any:
    return sd_mecha.n_average(*map(sd_mecha.model, paths))


# --- where it may go -------------------------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist(tmp_path: Path, a: Path) -> None:
    path = tmp_path / "no" / "out.safetensors"
    with refused(OutputFolderError, FileNotFoundError, OutputError, says=[path, path.parent, "create it"]):
        sd_mecha.merge(average(a), output=path)
    assert not path.parent.exists()


def test_a_folder_as_output(tmp_path: Path, a: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with refused(OutputError, OSError, says=[tmp_path, "is a folder", "name a file"]):
        sd_mecha.merge(average(a), output=tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder here that nobody can write to")
def test_a_folder_that_cannot_be_written(a: Path) -> None:
    with refused(OutputError, OSError, says=["/proc/out.safetensors", "cannot be created", "choose another folder"]):
        sd_mecha.merge(average(a), output="/proc/out.safetensors")


def test_a_folder_without_permission(old: Path, a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with refused(OutputError, OSError, says=[old, "Permission denied", "check the permissions"]):
        sd_mecha.merge(average(a), output=old)
    assert old.read_bytes() == OLD


@pytest.mark.parametrize("output_format", [None, "huggingface", "safetensors"])
@pytest.mark.parametrize("name", ["closed/x.safetensors", "closed/x/", "closed/"])
def test_a_folder_that_may_not_be_looked_into(closed: Path, name: str, output_format: str | None) -> None:
    output = f"{closed.parent}/{name}"
    with refused(OutputError, says=[output.rstrip("/"), "cannot be created: Permission denied"]):
        sd_mecha.merge(sd_mecha.model({"w": torch.ones(1)}), output=output, output_format=output_format)


@pytest.mark.skipif(os.name == "nt", reason="long names are missing names there")
@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".safetensors", "x" * 300 + "/", "x" * 300 + "/y.gguf"])
def test_a_name_that_is_too_long(tmp_path: Path, a: Path, name: str) -> None:
    with refused(OutputError, OSError, says=["x" * 300, "cannot be created: File name too long"]):
        sd_mecha.merge(average(a), output=f"{tmp_path}/{name}")
    with refused(OutputError, OSError, says=["x" * 300, "cannot be created: File name too long"]):
        sd_mecha.merge_many({f"{tmp_path}/{name}": average(a)})


@pytest.mark.parametrize("name", ["merged", "merged.fp16", "merged.ckpt"])
def test_any_name_can_be_written_and_holds_safetensors(tmp_path: Path, a: Path, b: Path, name: str) -> None:
    sd_mecha.merge(average(a, b), output=tmp_path / name)
    assert read(tmp_path / name)["b"].tolist() == [2.0] * 4
    assert sd_mecha.merge(sd_mecha.model(tmp_path / name))["b"].tolist() == [2.0] * 4


def test_a_recipe_file_is_written_whole_or_not_at_all(tmp_path: Path, a: Path) -> None:
    with refused(OutputFolderError, FileNotFoundError, says=["r.mecha", "no"]):
        sd_mecha.serialize(average(a), output=tmp_path / "no" / "r.mecha")
    path = tmp_path / "r.mecha"
    path.write_text("old")
    text = sd_mecha.serialize(average(a), output=path)
    assert path.read_text() == text
    assert sd_mecha.deserialize_path(path) == sd_mecha.deserialize(text)


# --- when it appears -------------------------------------------------------------------------------------------------


@THREADS
def test_an_existing_file_is_replaced_at_the_end_only(old: Path, a: Path, threads: int) -> None:
    seen = []

    @merge_method(register=False)
    def watch(a: Parameter(torch.Tensor)) -> Return(torch.Tensor):  # type: ignore[valid-type]
        if not a.is_meta:
            seen.append(old.read_bytes())
        return a

    sd_mecha.merge(watch(sd_mecha.model(a)), output=old, threads=threads)
    assert seen == [OLD, OLD]
    assert read(old)["b"].tolist() == [1.0] * 4
    assert only_file(old)


@THREADS
@pytest.mark.parametrize("which", [0, 1])
def test_an_output_may_be_one_of_its_inputs(a: Path, b: Path, threads: int, which: int) -> None:
    sd_mecha.merge(average(a, b), output=(a, b)[which], threads=threads, output_dtype=None)
    assert read((a, b)[which])["w"].unique().tolist() == [2.0]
    assert read((b, a)[which])["w"].unique().tolist() == [(3.0, 1.0)[which]]


@THREADS
def test_an_output_may_be_one_of_its_inputs_of_many_tiles(tmp_path: Path, threads: int) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    one, other = many(tmp_path / "one.safetensors", 0.0), many(folder / "other.safetensors", 2.0)
    sd_mecha.merge(average(one, other), output=other, threads=threads, total_buffer_size=1 << 16, output_dtype=None)
    assert {k: t.unique().tolist() for k, t in read(other).items()} == {f"k{i:02}": [i + 1.0] for i in range(40)}
    assert only_file(other)


def test_a_model_copied_onto_itself_stays_what_it_is(a: Path) -> None:
    before = read(a)
    sd_mecha.merge(sd_mecha.model(a), output=a, output_dtype=None)
    assert {k: t.tolist() for k, t in read(a).items()} == {k: t.tolist() for k, t in before.items()}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_to_an_input_stays_a_link(tmp_path: Path, a: Path, b: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(a)
    sd_mecha.merge(average(a, b), output=link)
    assert link.is_symlink()
    assert read(a)["b"].tolist() == [2.0] * 4


# --- what may go wrong on the way ------------------------------------------------------------------------------------


@THREADS
@pytest.mark.parametrize("error", [ValueError("boom"), KeyError("boom"), RuntimeError("size"), MemoryError()])
def test_a_method_that_raises(tmp_path: Path, old: Path, threads: int, error: Exception) -> None:
    one, other = many(tmp_path / "one.safetensors", 0.0), many(tmp_path / "other.safetensors", 2.0)
    with pytest.raises(type(error)) as caught:
        sd_mecha.merge(failing("k21", error)(one, other), output=old, threads=threads)
    assert caught.value is error
    assert "merge method fragile failed at key 'k21'" in getattr(error, "__notes__", [])
    assert old.read_bytes() == OLD
    assert only_file(old)


@THREADS
def test_a_mapping_is_filled_at_the_end_only(tmp_path: Path, threads: int) -> None:
    one, other = many(tmp_path / "one.safetensors", 0.0), many(tmp_path / "other.safetensors", 2.0)
    target = {"mine": 1}
    with pytest.raises(ValueError, match="boom"):
        sd_mecha.merge(failing("k21", ValueError("boom"))(one, other), output=target, threads=threads)
    assert target == {"mine": 1}


def test_a_recipe_that_cannot_be_planned_touches_nothing(tmp_path: Path, old: Path, a: Path) -> None:
    other = write_model(tmp_path / "x.safetensors", w=torch.zeros(1, 4), b=torch.zeros(4))
    with refused(ShapeError):
        sd_mecha.merge(average(a, other), output=old)
    assert old.read_bytes() == OLD
    assert only_file(old)


def test_either_all_of_several_outputs_appear_or_none(tmp_path: Path, old: Path) -> None:
    one, other = many(tmp_path / "one.safetensors", 0.0), many(tmp_path / "other.safetensors", 2.0)
    broken = failing("k21", ValueError("boom"))(one, other)
    with pytest.raises(ValueError, match="boom"):
        sd_mecha.merge_many({old: average(one, other), old.parent / "second.safetensors": broken})
    assert old.read_bytes() == OLD
    assert only_file(old)
    with refused(OutputFolderError):
        sd_mecha.merge_many({old: average(one, other), old.parent / "no" / "second.safetensors": average(one)})
    assert old.read_bytes() == OLD
    assert only_file(old)


def refusing(call: Callable[..., Any], code: int, after: int) -> Callable[..., Any]:
    """A system call that works `after` times and then fails."""
    left = [after]

    def run(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return call(*args)

    return run


@THREADS
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="the fallback is tested below")
def test_a_disk_that_fails_while_writing(
    tmp_path: Path, old: Path, threads: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = many(tmp_path / "one.safetensors", 0.0)
    monkeypatch.setattr(os, "pwrite", refusing(os.pwrite, code, after=7))
    with refused(OutputError, OSError, says=[old, os.strerror(code), "choose another folder"]):
        sd_mecha.merge(average(one, one), output=old, threads=threads)
    assert old.read_bytes() == OLD
    assert only_file(old)


@pytest.mark.parametrize("call", ["fsync", "replace", "ftruncate"])
def test_a_disk_that_fails_at_the_end(a: Path, old: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, refusing(getattr(os, call), errno.EIO, after=0))
    with refused(OutputError, OSError, says=[old, "cannot be completed"]):
        sd_mecha.merge(average(a), output=old)
    assert old.read_bytes() == OLD
    assert only_file(old)


@pytest.mark.parametrize("reserving", [True, False])
def test_a_full_disk_is_noticed_before_anything_is_merged(
    a: Path, old: Path, reserving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reserving:
        if not hasattr(os, "posix_fallocate"):
            pytest.skip("cannot reserve here")
        monkeypatch.setattr(os, "posix_fallocate", refusing(lambda *_: None, errno.ENOSPC, after=0))
    else:
        monkeypatch.setattr(platform.capabilities, "fallocate", False)
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    called = []

    @merge_method(register=False)
    def watch(a: Parameter(torch.Tensor)) -> Return(torch.Tensor):  # type: ignore[valid-type]
        called.extend([] if a.is_meta else [a])
        return a

    with refused(OutputError, OSError, says=[old, "no room", "free some space"]):
        sd_mecha.merge(watch(sd_mecha.model(a)), output=old)
    assert not called
    assert old.read_bytes() == OLD
    assert only_file(old)


def test_the_error_number_of_the_system_is_kept(a: Path, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.ENOSPC, after=0))
    with pytest.raises(OSError, match="No space left") as caught:
        sd_mecha.merge(average(a), output=old)
    assert caught.value.errno == errno.ENOSPC


# --- inputs that fail on the way -------------------------------------------------------------------------------------


@THREADS
def test_a_disk_that_fails_while_reading(tmp_path: Path, old: Path, threads: int, monkeypatch: Any) -> None:
    one, other = many(tmp_path / "one.safetensors", 0.0), many(tmp_path / "other.safetensors", 2.0)
    with monkeypatch.context() as patch:
        if hasattr(os, "preadv"):
            patch.setattr(os, "preadv", refusing(os.preadv, errno.EIO, after=20))
        else:
            pytest.skip("no positional reads here")
        with refused(
            ChangedInputError, OSError, says=["cannot be read at byte", os.strerror(errno.EIO), ".safetensors"]
        ):
            sd_mecha.merge(average(one, other), output=old, threads=threads)
    assert old.read_bytes() == OLD
    assert only_file(old)


CHANGES: dict[str, Callable[[Path], None]] = {
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "shortened": lambda path: os.truncate(path, path.stat().st_size // 2),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "replaced": lambda path: os.replace(many(path.with_name("new"), 9.0), path),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be changed so there")
@THREADS
@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_merged(tmp_path: Path, old: Path, threads: int, change: str) -> None:
    one, other = many(tmp_path / "one.safetensors", 0.0), many(tmp_path / "other.safetensors", 2.0)

    @merge_method(register=False)
    def meddle(
        a: Parameter(StateDict[torch.Tensor]),  # type: ignore[valid-type]
        b: Parameter(StateDict[torch.Tensor]),  # type: ignore[valid-type]
        **kwargs: Any,
    ) -> Return(torch.Tensor):  # type: ignore[valid-type]
        key = kwargs["key"]
        if key == "k21" and not a[key].is_meta:
            CHANGES[change](other)
        return a[key] + b[key]

    with refused(ChangedInputError, OSError, says=[other]):
        sd_mecha.merge(meddle(one, other), output=old, threads=threads)
    assert old.read_bytes() == OLD
    assert only_file(old)


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be changed so there")
@THREADS
def test_an_input_that_changes_while_it_is_streamed(a: Path, b: Path, threads: int) -> None:
    stream = sd_mecha.stream(average(a, b), threads=threads)
    next(stream)
    os.utime(b, ns=(1, 1))
    next(stream)
    with refused(ChangedInputError, OSError, says=[b]):
        next(stream)


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be changed so there")
@THREADS
def test_nothing_is_said_to_those_that_leave_a_stream_early(a: Path, b: Path, threads: int) -> None:
    stream = sd_mecha.stream(average(a, b), threads=threads)
    next(stream)
    os.utime(b, ns=(1, 1))
    stream.close()  # type: ignore[attr-defined]
