"""One hostile file per rule of the safetensors format: refused by name, by us and by the reference reader."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from sd_mecha.errors import FileFormatError, MechaError
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.safetensors import SafetensorsReader
from sd_mecha.storage.safetensors_header import parse_header
from tests.storage.support import entry, file_bytes

BROKEN = {
    "7 bytes": (b"1234567", "file too short: got 7 bytes, expected at least 8"),
    "zeros only": (bytes(64), "header too short: got 0 bytes"),
    "length beyond the file": (struct.pack("<Q", 99) + b"{}", "header longer than the file: got 99 bytes"),
    "length of a truncated file": (
        file_bytes({"a": entry()}, b"12")[:20],
        "header longer than the file: got 60 bytes, expected at most the 12 that follow",
    ),
    "length beyond 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "header too large: got 100000001 bytes"),
    "length 2**63": (struct.pack("<Q", 2**63) + b"{}", "header too large: got 9223372036854775808"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not valid UTF-8: invalid start byte at byte 2"),
    "not JSON": (file_bytes(b'{"a" 1}'), "not valid JSON: Expecting ':' delimiter at character 5"),
    "text after the JSON": (file_bytes(b"{}x"), "not valid JSON: Extra data"),
    "NUL padding": (file_bytes(b"{}", padding=b"\0\0"), "not valid JSON: Extra data"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "does not start with '{'"),
    "a list": (file_bytes([1]), r"does not start with '{': got b'\[1\]'"),
    "control character": (file_bytes(b'{"__metadata__":{"a":"\n"}}'), "not valid JSON: Invalid control char"),
    "half a surrogate pair": (file_bytes(b'{"__metadata__":{"a":"\\uD800"}}'), "not valid Unicode"),
    "nested without end": (file_bytes(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "NaN": (file_bytes(b'{"a":NaN}'), "got NaN, expected a finite number"),
    "Infinity": (file_bytes(b'{"a":-Infinity}'), "got -Infinity, expected a finite number"),
    "5000 digits": (
        file_bytes(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'),
        "number too large: got 5000 digits",
    ),
    "key twice": (
        file_bytes(
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
            b"123",
        ),
        "names a key twice: got 'a'",
    ),
    "field twice": (
        file_bytes(b'{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"12"),
        "names a key twice: got 'dtype'",
    ),
    "metadata twice": (file_bytes(b'{"__metadata__":{},"__metadata__":{}}'), "key twice: got '__metadata__'"),
    "metadata is a list": (file_bytes({"__metadata__": []}), r"not a map from text to text: got \[\]"),
    "metadata holds a number": (file_bytes({"__metadata__": {"k": 1}}), "got 'k': 1, expected text"),
    "entry is a number": (file_bytes({"a": 1}), "tensor 'a': entry is not an object: got 1"),
    "field missing": (
        file_bytes({"a": {"dtype": "U8", "shape": [2]}}, b"12"),
        r"tensor 'a': field missing: got \['dtype', 'shape'\], expected 'data_offsets'",
    ),
    "unknown dtype": (file_bytes({"a": entry("Q8")}, b"12"), "unknown dtype: got 'Q8', expected one of F64"),
    "dtype is a list": (file_bytes({"a": entry(["U8"])}, b"12"), r"unknown dtype: got \['U8'\]"),
    "shape is a number": (file_bytes({"a": entry(shape=2)}, b"12"), "shape is not a list: got 2"),
    "negative size": (file_bytes({"a": entry(shape=[-2])}, b"12"), r"bad size in shape: got \[-2\]"),
    "bool as a size": (file_bytes({"a": entry(shape=[2, True])}, b"12"), r"got \[2, True\]"),
    "float as a size": (file_bytes({"a": entry(shape=[2.0])}, b"12"), r"bad size in shape: got \[2.0\]"),
    "minus zero as a size": (
        file_bytes(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "bad size in shape",
    ),
    "2**60 x 2**60": (file_bytes({"a": entry(shape=[2**60, 2**60])}, b"12"), "shape too large: got"),
    "product that wraps to 2": (
        file_bytes({"a": entry("U16", shape=[2**63, 1])}, b""),
        r"shape too large: got \[9223372036854775808, 1\], expected at most",
    ),
    "huge sizes and a zero": (
        file_bytes({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}),
        "shape too large",
    ),
    "offsets of another length": (
        file_bytes({"a": entry("F32")}, b"12"),
        r"tensor 'a': data_offsets do not match shape and dtype: got 2 bytes, expected 8 for F32 \[2\]",
    ),
    "one offset": (file_bytes({"a": entry(offsets=[2])}, b"12"), r"bad data_offsets: got \[2\]"),
    "three offsets": (file_bytes({"a": entry(offsets=[0, 1, 2])}, b"12"), "bad data_offsets"),
    "float offsets": (file_bytes({"a": entry(offsets=[0, 2.0])}, b"12"), "bad data_offsets"),
    "offsets reversed": (file_bytes({"a": entry(offsets=[2, 0])}, b"12"), "data_offsets out of order"),
    "negative offset": (file_bytes({"a": entry(offsets=[-2, 0])}, b"12"), r"out of order: got \[-2, 0\]"),
    "overlap": (
        file_bytes({"a": entry(), "b": entry(offsets=[1, 3])}, b"123"),
        "tensor 'b': data_offsets overlap: got begin 1 inside tensor 'a', expected begin 2",
    ),
    "two tensors share bytes": (file_bytes({"a": entry(), "b": entry()}, b"12"), "data_offsets overlap"),
    "empty tensor inside another": (
        file_bytes({"a": entry(), "b": entry(shape=[0], offsets=[1, 1])}, b"12"),
        "data_offsets overlap",
    ),
    "hole": (
        file_bytes({"a": entry(), "b": entry(offsets=[3, 5])}, b"12345"),
        "tensor 'b': hole in the data before it: got begin 3, expected begin 2",
    ),
    "hole at the start": (file_bytes({"a": entry(offsets=[1, 3])}, b"123"), "hole in the data before it"),
    "data too short": (
        file_bytes({"a": entry(), "b": entry(offsets=[2, 4])}, b"123"),
        "tensor 'b': data_offsets beyond the end of the file: got end 4, .* the 3 bytes of data",
    ),
    "data too long": (
        file_bytes({"a": entry()}, b"123"),
        "data longer than the tensors: got 3 bytes of data, expected 2",
    ),
    "F4 in half a byte": (
        file_bytes({"a": entry("F4", shape=[3], offsets=[0, 1])}, b"1"),
        "F4 values do not fill whole bytes",
    ),
    "F4 without sizes": (file_bytes({"a": entry("F4", shape=[], offsets=[0, 0])}), "do not fill whole bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        SafetensorsReader(path)
    assert str(caught.value).startswith(str(path))
    path.unlink()  # works on Windows only if nothing holds it open


@pytest.mark.parametrize("name", BROKEN)
def test_reference_reader_refuses_it_too(tmp_path, name):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[name][0])
    with pytest.raises(SafetensorError):
        safe_open(path, "pt").__enter__()


STRICTER_FILES = {
    "space before the object": (file_bytes(b" {}"), "does not start with '{'"),
    "metadata key twice": (file_bytes(b'{"__metadata__":{"a":"1","a":"2"}}'), "key twice: got 'a'"),
    "tensor without bytes twice": (
        file_bytes(
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "key twice: got 'a'",
    ),
    "entry as a list": (file_bytes({"a": ["U8", [2], [0, 2]]}, b"12"), "entry is not an object"),
    "zero, then huge sizes": (
        file_bytes({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}),
        "shape too large",
    ),
    "6-bit floats": (
        file_bytes({"a": entry("F6_E2M3", shape=[4], offsets=[0, 3])}, b"123"),
        "dtype without a torch counterpart: got 'F6_E2M3'",
    ),
    "F4 rows of half bytes": (
        file_bytes({"a": entry("F4", shape=[2, 3], offsets=[0, 3])}, b"123"),
        r"F4 values do not fill whole bytes: got \[2, 3\], expected an even last size",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), STRICTER_FILES.values(), ids=STRICTER_FILES)
def test_refused_although_the_reference_reader_opens_it(tmp_path, content, message):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    safe_open(path, "pt").__enter__()
    with pytest.raises(FileFormatError, match=message):
        SafetensorsReader(path)


FOREIGN = {
    "empty": (b"", "empty file"),
    "HTML": (b"\n<!DOCTYPE html><html><body>Please log in</body></html>", "web page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "zip": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", "PyTorch checkpoint"),
    "pickle": (b"\x80\x02}q\x00(X\x06\x00\x00\x00weight", "pickle"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(32), "GGUF"),
    "JSON": (b'{"weight_map": {}}', "JSON text"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "picture"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01", "picture"),
    "text": (b"Invalid credentials\n", "a text, which begins with 'Invalid credentials'; download"),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_file_is_recognised(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=f"is not a safetensors file but .*{message}"):
        SafetensorsReader(path)


@pytest.mark.parametrize("content", [bytes(range(200, 256)), bytes(64), b"\0\0\0"], ids=["random", "zeros", "short"])
def test_what_is_nothing_known_is_first_said_to_be_no_safetensors_file(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        SafetensorsReader(path)
    assert str(caught.value).startswith(f"{path}: this is no safetensors file, or a damaged one: ")
    assert "download it again" in str(caught.value)


def test_a_length_that_looks_like_a_pickle_is_still_a_length(tmp_path):
    path = tmp_path / "model.safetensors"
    content = file_bytes(b"{}", padding=b" " * 638)
    assert content.startswith(b"\x80\x02")
    path.write_bytes(content)
    SafetensorsReader(path).close()
    path.write_bytes(content[:100])
    with pytest.raises(FileFormatError, match="header longer than the file"):
        SafetensorsReader(path)


@pytest.mark.parametrize(
    "content",
    [
        file_bytes(b"{}"),
        file_bytes(b"{}", padding=b" \n\t"),
        file_bytes({"__metadata__": None}),
        file_bytes({"a": {**entry(), "comment": [1, {"b": 2.5}]}}, b"12"),
        file_bytes({"": entry()}, b"12"),
        file_bytes({"b": entry(offsets=[2, 4]), "a": entry()}, b"1234"),
        file_bytes({"a": entry(), "z": entry(shape=[0, 3], offsets=[2, 2])}, b"12"),
        file_bytes(b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"12"),
    ],
    ids=[
        "bare",
        "padded",
        "null metadata",
        "extra field",
        "empty name",
        "unordered",
        "empty tensor",
        "emoji",
    ],
)
def test_unusual_but_valid(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with safe_open(path, "pt") as reference:
        expected = {key: tuple(reference.get_slice(key).get_shape()) for key in list(reference.keys())}
        metadata = reference.metadata()
    reader = SafetensorsReader(path)
    assert {name: e.shape for name, e in reader.entries.items()} == expected
    assert reader.metadata == (metadata or {})
    reader.close()


def test_entries_come_in_the_order_of_the_data():
    header = {"b": entry(offsets=[2, 4]), "a": entry(), "e": entry(shape=[0], offsets=[2, 2])}
    entries, _ = parse_header(json.dumps(header).encode(), 4, "x")
    assert list(entries) == ["a", "e", "b"]


def test_f4_shape_is_counted_in_torch_elements():
    header = {"a": entry("F4", shape=[2, 6], offsets=[0, 6])}
    entries, _ = parse_header(json.dumps(header).encode(), 6, "x")
    assert entries["a"] == TensorEntry((2, 3), torch.float4_e2m1fn_x2)


VALID = file_bytes(
    {
        "__metadata__": {"k": "v"},
        "a": entry("F32", [2], [0, 8]),
        "b": entry("U8", [0, 3], [8, 8]),
        "c": entry(shape=[2], offsets=[8, 10]),
    },
    b"0123456789",
)  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, len(VALID))),
    st.binary(max_size=3),
)
def test_mutated_files_are_read_like_the_reference_or_refused(tmp_path_factory, changes, cut, tail):
    """Whatever we accept, the reference accepts with the same meaning; nothing but our own errors escapes."""
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(content[:cut]) + tail)
    try:
        reader = SafetensorsReader(path)
    except MechaError:
        return
    with safe_open(path, "pt") as reference:
        assert sorted(reader.entries) == sorted(reference.keys())
        assert reader.metadata == (reference.metadata() or {})
        for name, ours in reader.entries.items():
            assert ours.shape == tuple(reference.get_tensor(name).shape)
            assert ours.dtype == reference.get_tensor(name).dtype
    reader.close()


_TEXT = st.text(alphabet='aé"\\\n', max_size=3)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXT)
_JSON = st.one_of(_SCALARS, st.lists(_SCALARS, max_size=3), st.dictionaries(_TEXT, _SCALARS, max_size=3))
_ENTRY_LIKE = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "U8", "F4", "F6_E3M2", "X"]), _JSON),
        "shape": st.one_of(st.lists(st.integers(-1, 2**62), max_size=3), _JSON),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 12), min_size=2, max_size=2), _JSON),
    },
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.one_of(_ENTRY_LIKE, _JSON)),
    st.integers(0, 12),
)
def test_any_json_object_is_read_or_refused(header, data_size):
    try:
        entries, _ = parse_header(json.dumps(header).encode(), data_size, "x")
    except MechaError:
        return
    assert sum(e.nbytes for e in entries.values()) == data_size
