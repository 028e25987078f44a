"""A folder appears whole or not at all, and takes along what lay there before and is not replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sd_mecha.errors import OutputError, OutputFolderError
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.folders.output_folder import OutputFolder
from sd_mecha.storage.output_file import OutputFile
from tests.storage.folder_support import contents, nothing, weights


def test_a_new_folder_appears_at_once(tmp_path: Path, platform: str) -> None:
    output = OutputFolder(tmp_path / "new")
    output.create()
    output.put("config.json", b"{}")
    output.put("sub/x", b"1")
    assert not (tmp_path / "new").exists()
    output.publish(nothing)
    assert contents(tmp_path / "new") == {"config.json": b"{}", "sub/x": b"1"}
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.usefixtures("ways")
def test_what_is_not_replaced_comes_along(old: Path, platform: str) -> None:
    (old / "config.json").chmod(0o600)
    old.chmod(0o750)
    inode = (old / "notes.txt").stat().st_ino
    output = OutputFolder(old)
    output.create()
    output.put("config.json", b"new")
    output.put("model-1.safetensors", b"new weights")
    assert contents(old)["config.json"] == b"old"
    output.publish(weights)
    assert contents(old) == {
        "config.json": b"new",
        "model-1.safetensors": b"new weights",
        "notes.txt": b"mine",
        ".hidden": b"mine too",
        "sub/deep.txt": b"deep",
        "link": b"mine",
    }
    assert (old / "notes.txt").stat().st_ino == inode
    assert (old / "link").is_symlink()
    assert (old / "sub" / "empty").is_dir()
    assert old.stat().st_mode & 0o777 == 0o750
    assert os.listdir(old.parent) == ["model"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    output = OutputFolder(tmp_path / "model")
    output.create()
    output.put("x", b"1")
    output.publish(nothing)
    assert contents(tmp_path / "model") == {"x": b"1"}


def test_a_link_leads_to_the_folder_that_is_replaced(old: Path) -> None:
    (old.parent / "elsewhere").mkdir()
    link = old.parent / "elsewhere" / "link"
    link.symlink_to("../model", target_is_directory=True)
    output = OutputFolder(link)
    output.create()
    output.put("config.json", b"new")
    output.publish(nothing)
    assert link.is_symlink()
    assert contents(old)["config.json"] == b"new"


@pytest.mark.parametrize("name", ["thesis.txt", "lora.safetensors", ".bashrc"])
def test_a_folder_of_other_things_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / name).write_bytes(b"")
    with pytest.raises(OutputError, match=r"something else than a model, such as '.*'; name a file in it"):
        OutputFolder(tmp_path / "home").create()
    assert os.listdir(tmp_path) == ["home"]


def test_a_file_of_that_name_and_a_missing_parent_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match="is a file, and the output a folder"):
        OutputFolder(tmp_path / "file").create()
    with pytest.raises(OutputFolderError, match="there is no folder"):
        OutputFolder(tmp_path / "missing" / "model").create()
    with pytest.raises(OutputError):
        OutputFolder(tmp_path / "nul\0").create()


def test_discarding_leaves_the_old_folder_and_nothing_else(old: Path) -> None:
    before = contents(old)
    output = OutputFolder(old)
    output.create()
    output.put("config.json", b"new")
    output.discard()
    output.discard()
    assert contents(old) == before
    assert os.listdir(old.parent) == ["model"]


def test_a_second_merge_into_the_same_folder_is_refused(old: Path) -> None:
    first, second = OutputFolder(old), OutputFolder(old)
    first.create()
    first.put("x", b"1")
    with pytest.raises(OutputError, match="another merge is writing to it"):
        second.create()
    first.publish(nothing)
    second.create()
    second.discard()
    assert contents(old)["x"] == b"1"
    assert os.listdir(old.parent) == ["model"]


def test_what_a_killed_run_left_is_removed_or_kept_on_request(tmp_path: Path) -> None:
    left = tmp_path / ".model.part"
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "kept").write_bytes(b"1")
    (left / "sub" / "other").write_bytes(b"2")
    (tmp_path / ".model.part.lock").write_bytes(b"part    ")
    output = OutputFolder(tmp_path / "model")
    output.create(keep=["sub/kept"])
    assert contents(left) == {"sub/kept": b"1"}
    output.release()
    output.create()
    assert contents(left) == {}
    output.discard()
    assert os.listdir(tmp_path) == []


def test_a_link_is_not_kept_and_a_folder_that_was_about_to_be_published_is_open_again(tmp_path: Path) -> None:
    left = tmp_path / ".model.part"
    left.mkdir()
    (tmp_path / "victim").write_bytes(b"precious")
    (left / "kept").symlink_to("../victim")
    (left / "other").write_bytes(b"")
    left.chmod(0o500)
    (tmp_path / ".model.part.lock").write_bytes(b"part    ")
    output = OutputFolder(tmp_path / "model")
    output.create(keep=["kept"])
    assert os.listdir(left) == []
    assert left.stat().st_mode & 0o700 == 0o700
    output.discard()
    assert os.listdir(tmp_path) == ["victim"]


@pytest.mark.parametrize("keep", [[], ["kept"]])
def test_journals_that_no_merge_made_are_left_alone(tmp_path: Path, keep: list[str]) -> None:
    own = tmp_path / ".model.part.journals"
    own.mkdir()
    (own / "diary").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"journals' leads to something that no merge is known to have made"):
        OutputFolder(tmp_path / "model").create(keep)
    assert contents(own) == {"diary": b"mine"}
    assert os.listdir(tmp_path) == [own.name]


def test_journals_go_with_what_they_are_about(tmp_path: Path) -> None:
    def begin() -> OutputFolder:
        output = OutputFolder(tmp_path / "model")
        output.create(keep=["sub/kept"])
        return output

    output = begin()
    for name in ("sub/kept", "other"):
        output.put(name, b"1")
        Path(output.journal(name)).write_bytes(b"journal")
    output.release()
    output = begin()
    assert contents(tmp_path / ".model.part.journals") == {"sub/kept": b"journal"}
    output.release()
    output.create()
    assert not os.path.exists(output.journal("sub/kept"))
    output.release()
    output = begin()
    Path(output.journal("sub/kept")).write_bytes(b"journal")
    output.publish(nothing)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.usefixtures("ways")
def test_a_run_that_was_killed_while_it_published_is_put_right(old: Path) -> None:
    before = contents(old)
    old.rename(old.parent / ".model.old")
    (old.parent / ".model.part.lock").write_bytes(b"part old")
    output = OutputFolder(old)
    output.create()
    output.discard()
    assert contents(old) == before
    (old.parent / ".model.old").mkdir()
    (old.parent / ".model.old" / "pytorch_model.bin").write_bytes(b"")
    (old.parent / ".model.part.lock").write_bytes(b"part old")
    output.create()
    output.discard()
    assert contents(old) == before
    assert os.listdir(old.parent) == ["model"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_hidden_folder_that_no_merge_made_is_left_alone(old: Path, exists: bool) -> None:
    target = old if exists else old.parent / "new"
    own = old.parent / f".{target.name}.old"
    own.mkdir()
    (own / "thesis").write_bytes(b"mine")
    (old.parent / f".{target.name}.part.lock").write_bytes(b"part    ")  # left by a run that was killed early
    output = OutputFolder(target)
    output.create()
    output.put("config.json", b"new")
    output.discard()
    assert contents(own) == {"thesis": b"mine"}
    assert sorted(os.listdir(old.parent)) == sorted({"model", own.name})


def test_an_old_folder_in_the_way_is_refused_where_it_is_needed(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "exchange", False)
    before = contents(old)
    own = old.parent / ".model.old"
    own.mkdir()
    output = OutputFolder(old)
    output.create()
    with pytest.raises(OutputError, match=r"\.model\.old' is in the way; move or remove that"):
        output.publish(nothing)
    output.discard()
    assert contents(old) == before
    assert sorted(os.listdir(old.parent)) == [".model.old", "model"]


@pytest.mark.parametrize("keep", [[], ["config.json"]])
def test_a_folder_of_the_temporary_name_that_no_merge_made_is_refused(old: Path, keep: list[str]) -> None:
    own = old.parent / ".model.part"
    own.mkdir()
    (own / "thesis").write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(OutputError, match="something that no merge is known to have made; move that"):
            OutputFolder(old).create(keep)
        assert contents(own) == {"thesis": b"mine"}
        assert sorted(os.listdir(old.parent)) == [".model.part", "model"]
    (own / "thesis").unlink()
    output = OutputFolder(old)
    output.create(keep)
    output.discard()
    assert os.listdir(old.parent) == ["model"]


def test_what_a_run_released_is_known_as_its_own(old: Path) -> None:
    output = OutputFolder(old)
    output.create()
    output.put("config.json", b"new")
    output.release()
    assert contents(old.parent / ".model.part") == {"config.json": b"new"}
    output.create()
    output.discard()
    assert os.listdir(old.parent) == ["model"]


@pytest.mark.skipif(not capabilities.flock, reason="needs locks")
def test_a_merge_into_a_file_and_one_into_a_folder_exclude_each_other(tmp_path: Path) -> None:
    file, folder = OutputFile(tmp_path / "model"), OutputFolder(tmp_path / "model")
    file.create(8)
    with pytest.raises(OutputError, match="another merge is writing to it"):
        folder.create()
    file.write_at(0, memoryview(b"12345678"))
    file.publish(8)
    assert (tmp_path / "model").read_bytes() == b"12345678"
    (tmp_path / "model").unlink()
    (tmp_path / ".model.part").write_bytes(b"of a merge into a file that was killed")
    (tmp_path / ".model.part.journal").write_bytes(b"and its journal")
    folder.create()
    with pytest.raises(OutputError, match="another merge is writing to it"):
        file.create(8)
    folder.put("x", b"1")
    folder.publish(nothing)
    assert contents(tmp_path / "model") == {"x": b"1"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_merge_into_a_file_removes_what_one_into_a_folder_has_left(tmp_path: Path, exists: bool) -> None:
    folder, file = OutputFolder(tmp_path / "model"), OutputFile(tmp_path / "model")
    folder.create(keep=["x"])
    folder.put("x", b"1")
    Path(folder.journal("x")).write_bytes(b"journal")
    folder.release()
    if exists:
        (tmp_path / "model").write_bytes(b"old")
    file.create(8)
    file.publish(8)
    assert (tmp_path / "model").read_bytes() == bytes(8)
    assert os.listdir(tmp_path) == ["model"]


def test_a_merge_into_a_file_puts_back_the_old_folder_that_a_killed_one_has_moved(old: Path) -> None:
    before = contents(old)
    old.rename(old.parent / ".model.old")
    (old.parent / ".model.part").mkdir()
    (old.parent / ".model.part" / "x").write_bytes(b"new")
    (old.parent / ".model.part.lock").write_bytes(b"part old")
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        OutputFile(old).create(8)
    assert contents(old) == before
    assert os.listdir(old.parent) == ["model"]


def test_an_old_folder_is_not_removed_for_a_file_that_has_its_name(old: Path) -> None:
    before = contents(old)
    old.rename(old.parent / ".model.old")
    (old.parent / ".model.part").mkdir()
    (old.parent / ".model.part.lock").write_bytes(b"part old")
    old.write_bytes(b"somebody's")
    output = OutputFile(old)
    output.create(8)
    output.discard()
    assert contents(old.parent / ".model.old") == before
    assert old.read_bytes() == b"somebody's"


def test_a_merge_into_a_file_leaves_a_folder_alone_that_no_merge_made(tmp_path: Path) -> None:
    own = tmp_path / ".model.part"
    own.mkdir()
    (own / "thesis").write_bytes(b"mine")
    with pytest.raises(OutputError, match="no merge is known to have made; move that, or choose another name"):
        OutputFile(tmp_path / "model").create(8)
    assert contents(own) == {"thesis": b"mine"}
    assert os.listdir(tmp_path) == [own.name]


def test_a_file_of_the_name_of_the_lock_file_that_no_merge_made_is_refused(tmp_path: Path) -> None:
    own = tmp_path / ".model.part.lock"
    own.write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(OutputError, match=r"part\.lock', .* holds something that no merge writes there; move that"):
            OutputFolder(tmp_path / "model").create()
        assert own.read_bytes() == b"mine"
        assert os.listdir(tmp_path) == [own.name]
