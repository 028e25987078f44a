"""Zip archives that torch.save did not write so, and tensors that a file says it holds but does not."""

from __future__ import annotations

import zipfile

import pytest
import torch

from sd_mecha.errors import FileFormatError
from tests.storage.support import raw
from tests.storage.torch_files import archive, members_of, opened, read_all, saved, with_pickle


def plain_members() -> dict[str, bytes]:
    return members_of(saved({"w": torch.ones(2)}))


def replaced(name: str, data: bytes | None) -> bytes:
    members = plain_members()
    found = next(member for member in members if member.endswith(name))
    if data is None:
        del members[found]
    else:
        members[found] = data
    return archive(members)


def patched(old: bytes, new: bytes) -> bytes:
    data = archive(plain_members())
    assert old in data
    return data.replace(old, new, 1)


def overlapping() -> bytes:
    """The directory says of the last member that it lies where the first one does."""
    data = bytearray(archive({"archive/data.pkl": b"\x80\x02}.", "archive/second.p": b"\x80\x02}."}))
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = bytes(4)
    return bytes(data)


def encrypted() -> bytes:
    data = bytearray(archive(plain_members()))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


ARCHIVES = {
    "compressed": (lambda: archive(plain_members(), compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "encrypted": (encrypted, "is encrypted"),
    "overlapping": (overlapping, "reaches into what follows"),
    "no directory": (lambda: archive(plain_members())[:-30], "no directory at its end.*truncated"),
    "storage missing": (lambda: replaced("data/0", None), "tensor 'w': its storage '0' is not in the archive"),
    "storage too short": (lambda: replaced("data/0", b"1234567"), "has 7 bytes; expected 8 bytes"),
    "pickle followed by another": (lambda: with_pickle(b"\x80\x02}.\x80\x02}."), "4 bytes follow the pickle"),
    "no pickle in it": (lambda: with_pickle(b""), "before it is complete"),
    "two pickles": (lambda: archive({**plain_members(), "x/data.pkl": b""}), "2 members named"),
    "TorchScript": (lambda: archive({"a/data.pkl": b"", "a/constants.pkl": b""}), "TorchScript"),
    "name twice": (lambda: archive({"a/data.pkl": b"", "b/data.pkl": b""}).replace(b"b/d", b"a/d"), "a member twice"),
    "more members than entries": (
        lambda: patched(b"\x07\0\x07\0", b"\x77\0\x77\0"),
        "does not fit",
    ),
    "name differs in its header": (lambda: patched(b"/data.pkl", b"/data.pkx"), "is at byte 0, where it is not"),
}


@pytest.mark.parametrize(("make", "message"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_breaks_a_rule_is_refused(make, message):
    data = make()
    with pytest.raises(FileFormatError, match=message):
        read_all(data)


def test_an_archive_with_a_comment_is_read():
    data = archive(plain_members())
    comment = b"PK\x05\x06 " * 2000
    assert list(read_all(data[:-2] + len(comment).to_bytes(2, "little") + comment)) == ["w"]


def test_a_directory_bomb_is_refused_without_memory():
    record = b"PK\x05\x06" + bytes(4) + b"\xff\xff" * 2 + b"\xff\xff\xff\xff" * 2 + bytes(2)
    large = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes(12) + (2**40).to_bytes(8, "little") * 4
    place = b"PK\x06\x07" + bytes(4) + (4).to_bytes(8, "little") + bytes(4)
    with pytest.raises(FileFormatError, match=f"{2**40} members"):
        opened(b"PK\x03\x04" + large + place + record)


def test_large_archives_with_64_bit_numbers(monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    data = archive(plain_members())
    assert b"PK\x06\x06" in data
    assert read_all(data) == {"w": raw(torch.ones(2))}


# --- tensors that the file does not hold -----------------------------------------------------------------------------


def described(offset=0, shape=(2,), strides=(1,), numel=2, kind="FloatStorage", key="0") -> bytes:
    """An archive whose only tensor is described in that way, over 8 bytes of data."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n((" + _plain("storage")
    members = plain_members()
    (folder,) = {name.partition("/")[0] for name in members}
    call += f"ctorch\n{kind}\n".encode() + _plain(key) + _plain("cpu") + _plain(numel) + b"tQ"
    call += _plain(offset) + _plain(shape) + _plain(strides) + b"\x89N" + b"tR"
    members[f"{folder}/data.pkl"] = b"\x80\x02}" + _plain("w") + call + b"s."
    return archive(members)


def _plain(value: object) -> bytes:
    """A value as opcodes that touch no memo."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_plain, value)) + b"t"
    if isinstance(value, str):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()
    if isinstance(value, int):
        return b"\x8a\x20" + value.to_bytes(32, "little", signed=True)
    return b"N" if value is None else b"G" + bytes(8)


def test_the_description_used_here_is_right():
    assert read_all(described()) == {"w": raw(torch.ones(2))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3,)}, "it reaches to byte 12 of storage '0', which has 8"),
        ({"offset": 1}, "it reaches to byte 12"),
        ({"strides": (2,)}, "it reaches to byte 12"),
        ({"strides": (2**62,)}, "reach beyond"),
        ({"shape": (1, 2), "strides": (2**100, 1)}, "its strides holds other than whole numbers"),
        ({"offset": -1}, "its offset is no whole number"),
        ({"offset": None}, "its offset is no whole number"),
        ({"shape": (-1,)}, "its shape holds other than whole numbers"),
        ({"strides": (-1,)}, "its strides holds other than whole numbers"),
        ({"shape": (2.0,)}, "its shape holds other than whole numbers"),
        ({"shape": 2}, "its shape is no tuple"),
        ({"shape": (1, 2)}, "2 dimensions but 1 strides"),
        ({"shape": (1,) * 65, "strides": (0,) * 65}, "no tuple of at most 64"),
        ({"shape": (2**60,), "strides": (0,)}, "repeats the elements in the file"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "its shape means more than"),
        ({"shape": (0, 2**62, 2**62), "strides": (0, 0, 0)}, "its shape means more than"),
        ({"numel": 4}, "has 8 bytes; expected 16 bytes"),
        ({"numel": 2**61}, "no storage of a tensor"),
        ({"numel": -1}, "no storage of a tensor"),
        ({"key": "../../data/0"}, "is not in the archive"),
        ({"kind": "QInt32Storage"}, "its dtype qint32 cannot be merged"),
        ({"kind": "Size"}, "no storage of a tensor"),
        ({"kind": "NopeStorage"}, "'torch.NopeStorage', which is not on the list"),
    ],
    ids=str,
)
def test_a_tensor_outside_of_its_storage_is_refused(change, message):
    with pytest.raises(FileFormatError, match=message):
        opened(described(**change))


@pytest.mark.parametrize(("flag", "message"), [("conj", "float32 is not complex"), ("neg", "int32 never is")])
def test_flags_that_do_not_fit_the_dtype_are_refused(flag, message):
    name = "FloatStorage" if flag == "conj" else "IntStorage"
    members = members_of(saved({"w": torch.ones(1, dtype=torch.complex64).conj()}))
    found = next(member for member in members if member.endswith("data.pkl"))
    raw_pickle = members[found].replace(b"ComplexFloatStorage", name.encode()).replace(b"K\x01tq", b"K\x02tq", 1)
    members[found] = raw_pickle.replace(b"X\x04\x00\x00\x00conj", b"X" + bytes([len(flag), 0, 0, 0]) + flag.encode())
    with pytest.raises(FileFormatError, match=message):
        opened(archive(members))
