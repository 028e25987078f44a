from __future__ import annotations

import fsspec
import pytest

from sd_mecha.errors import ChangedInputError, MechaError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.locations import locate
from sd_mecha.storage.remote import file as remote_file
from sd_mecha.storage.remote import filesystems
from sd_mecha.storage.remote.location import RemoteLocation

CONTENT = bytes(i * 7 % 251 for i in range(300_000))


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(remote_file.PATIENCE, "pause", 0.001)
    system = fsspec.filesystem("memory")
    system.pipe({"/remote-test/a.bin": CONTENT, "/remote-test/sub/b.bin": b"b"})
    yield system
    system.rm("/remote-test", recursive=True)


def test_files_and_folders(memory):
    place = locate("memory://remote-test")
    assert isinstance(place, RemoteLocation)
    assert place.is_folder()
    assert not place.is_file()
    assert place.children() == ["a.bin", "sub"]
    assert place.child("sub/b.bin").read(10) == b"b"
    child = place.child("a.bin")
    assert (child.name, child.basename) == ("memory://remote-test/a.bin", "a.bin")
    assert child.parent().name == "memory://remote-test"
    assert child.parent().children() == ["a.bin", "sub"]
    assert child.head == CONTENT[:256]
    file = child.open()
    assert file.read(123_456, 10_000) == CONTENT[123_456:133_456]
    file.check_unchanged()
    memory.pipe("/remote-test/a.bin", CONTENT)
    with pytest.raises(ChangedInputError, match=r"changed while it was in use \(created was"):
        file.check_unchanged()
    file.close()
    with pytest.raises(ModelNotFoundError, match="is a folder"):
        place.open()


def test_missing_ones(memory):
    place = locate("memory://remote-test/none")
    assert not place.is_file()
    assert not place.is_folder()
    assert place.children() == []
    with pytest.raises(ModelNotFoundError, match="was not found"):
        place.open()


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError("reset"), ModelAccessError, "cannot be reached: OSError: reset; tried 5 times"),
        (PermissionError("no"), ModelAccessError, "wants a login or other credentials"),
        (type("NoCredentialsError", (Exception,), {})("none"), ModelAccessError, "wants a login"),
        (FileNotFoundError("gone"), ModelNotFoundError, "was not found"),
        (ValueError("odd"), ModelAccessError, "cannot be read: ValueError: odd"),
    ],
)
def test_errors_are_translated(memory, monkeypatch, error, expected, message):
    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "info", fail)
        with pytest.raises(expected, match=message):
            locate("memory://remote-test/a.bin").open()


def test_a_failure_while_reading_is_mended(memory, monkeypatch):
    read = type(memory).cat_file
    faults = ["reset", "short"]

    def flaky(self, path, start=None, end=None):
        fault = faults.pop(0) if faults else ""
        if fault == "reset":
            raise OSError(fault)
        return read(self, path, start=start, end=start + 20 if fault == "short" else end)

    file = locate("memory://remote-test/a.bin").open()
    monkeypatch.setattr(type(memory), "cat_file", flaky)
    data = file.read(100_000, 50)
    file.close()
    assert not faults
    assert data == CONTENT[100_000:100_050]


def test_passwords_are_not_shown():
    place = filesystems.FilesystemPlace("sftp://me:pw@host/a/b.bin", object(), "/a/b.bin")
    assert place.name == "sftp://host/a/b.bin"
    assert place.above().name == "sftp://host/a"
    assert filesystems.FilesystemPlace("hf://me/gpt2@main/b.bin", object(), "x").name == "hf://me/gpt2@main/b.bin"


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("hf", "hf")])
def test_a_missing_library_is_named(monkeypatch, scheme, extra):
    def missing(*args, **kwargs):
        raise ImportError("Install it")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(MechaError, match=rf"pip install 'sd-mecha\[{extra}\]'"):
        locate(f"{scheme}://a/b")


def test_hugging_face_is_asked_through_its_own_library():
    from huggingface_hub import HfFileSystem

    place = RemoteLocation("hf://owner/repository@main/folder/model.safetensors")
    assert isinstance(place._place, filesystems.FilesystemPlace)
    assert isinstance(place._place._system, HfFileSystem)
    assert place.parent().child("other.safetensors").name == "hf://owner/repository@main/folder/other.safetensors"


def test_a_listing_that_fails_for_a_moment_is_asked_again(monkeypatch):
    answers = [ConnectionResetError("gone"), True]

    def isdir(self, path, **_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(remote_file.PATIENCE, "pause", 0.001)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.isdir", isdir)
    assert RemoteLocation("memory://remote-test/folder").is_folder()
    answers[:] = [ConnectionResetError("gone")] * 10
    with pytest.raises(ModelAccessError, match="cannot be reached"):
        RemoteLocation("memory://remote-test/folder").is_folder()
