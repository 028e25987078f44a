"""GGUF files that are wrong on purpose: refused by a rule, in little time and memory."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sd_mecha.errors import FileFormatError, MechaError
from sd_mecha.storage.files import RangeFile
from sd_mecha.storage.gguf.layout import taken_over
from sd_mecha.storage.gguf.reader import GgufReader
from tests.storage.gguf_support import file_of, info, pair, text

_HUGE = 2**62
_U32 = struct.Struct("<I").pack
_U64 = struct.Struct("<Q").pack


def _array(kind: int, count: int, values: bytes = b"") -> bytes:
    return _U32(kind) + _U64(count) + values


_HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "file has 0"),
    "magic only": (b"GGUF", "file has 4"),
    "another format": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "version 1": (file_of(version=1), "of version 1, expected 2 or 3"),
    "version 0": (file_of(version=0), "of version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "big-endian"),
    "2^63 tensors": (file_of(counts=(2**63, 0)), "claims to have 9223372036854775808 tensors"),
    "2^63 keys": (file_of(counts=(0, 2**63)), "claims to have 9223372036854775808 keys"),
    "more tensors than bytes": (file_of(counts=(100_000, 0)), "100000 tensors, which need more than"),
    "more keys than bytes": (file_of(counts=(0, 90_000)), "90000 keys, which need more than"),
    "a key of 2^62 bytes": (file_of([_U64(_HUGE) + bytes(40)]), f"takes {_HUGE} bytes"),
    "a key of 70000 bytes": (file_of([pair("k" * 70_000, 4, _U32(1))]), "has 70000 bytes, expected at most 65535"),
    "a key that is not UTF-8": (file_of([pair(b"\xff\xfe", 4, _U32(1))]), "not valid UTF-8"),
    "a text of 2^62 bytes": (file_of([pair("k", 8, _U64(_HUGE))]), f"takes {_HUGE} bytes"),
    "a text of 2^64-1 bytes": (file_of([pair("k", 8, _U64(2**64 - 1))]), "takes 18446744073709551615 bytes"),
    "a value of an unknown kind": (file_of([pair("k", 13, bytes(8))]), "kind 13"),
    "2^62 numbers": (file_of([pair("k", 9, _array(4, _HUGE))]), f"{_HUGE} numbers of key 'k'"),
    "2^62 texts": (file_of([pair("k", 9, _array(8, _HUGE))]), f"{_HUGE} strings of key 'k'"),
    "a text of 2^62 bytes in an array": (
        file_of([pair("k", 9, _array(8, 2, _U64(_HUGE) * 2))]),
        "strings of key 'k' re",
    ),
    "arrays in arrays": (file_of([pair("k", 9, _array(9, 1, _array(9, 1, _array(4, 0))))]), "arrays within arrays"),
    "an array of an unknown kind": (file_of([pair("k", 9, _array(77, 1))]), "values of kind 77"),
    "a key twice": (file_of([pair("k", 4, _U32(1))] * 2), "key 'k' is there twice"),
    "an alignment of 0": (file_of([pair("general.alignment", 4, _U32(0))]), "general.alignment is 0"),
    "an alignment of 24": (file_of([pair("general.alignment", 4, _U32(24))]), "general.alignment is 24"),
    "an alignment of 2^31": (file_of([pair("general.alignment", 4, _U32(2**31))]), "expected a power of two"),
    "an alignment in words": (file_of([pair("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
    "a name of 2^62 bytes": (file_of([], [_U64(_HUGE) + bytes(40)]), f"takes {_HUGE} bytes"),
    "a name that is not UTF-8": (file_of([], [info(b"\xc3(", (1,))], bytes(4)), "not valid UTF-8"),
    "2^32-1 dimensions": (file_of([], [text("w") + _U32(2**32 - 1) + bytes(40)]), "'w' has 4294967295 dimensions"),
    "2^60 elements": (file_of([], [info("w", (2**60,))], bytes(64)), "'w' reaches to byte"),
    "2^120 elements": (file_of([], [info("w", (2**60, 2**60))], bytes(64)), "more elements than any tensor can"),
    "2^63 and none": (file_of([], [info("w", (2**63, 0))], bytes(64)), "more elements than any tensor can"),
    "an offset of 2^63": (file_of([], [info("w", (1,), 0, 2**63)], bytes(64)), "'w' reaches to byte"),
    "an offset of 2^64-32": (file_of([], [info("w", (1,), 0, 2**64 - 32)], bytes(64)), "'w' reaches to byte"),
    "an offset that is not aligned": (file_of([], [info("w", (1,), 0, 4)], bytes(64)), "'w' is at offset 4, expected"),
    "an end beyond the file": (file_of([], [info("w", (9,))], bytes(35)), "'w' reaches to byte"),
    "overlap": (file_of([], [info("v", (9,)), info("w", (9,), 0, 32)], bytes(99)), "'w' at byte 128 overlaps 'v'"),
    "the same place": (file_of([], [info("v", (9,)), info("w", (9,))], bytes(99)), "overlaps"),
    "a tensor twice": (file_of([], [info("w", (1,)), info("w", (1,), 0, 32)], bytes(99)), "tensor 'w' is there twice"),
    "a shape that does not fit": (
        file_of(
            [pair("comfy.gguf.orig_shape.w", 9, _array(5, 2, struct.pack("<2i", -1, -4)))], [info("w", (4,))], bytes(16)
        ),
        "orig_shape.w is",
    ),
}


def _open(path: Path, content: bytes) -> GgufReader:
    path.write_bytes(content)
    return GgufReader(RangeFile(path))


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_headers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    content, says = _HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            _open(tmp_path / "bad.gguf", content)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert says in str(caught.value)
    assert "bad.gguf" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_rows_that_do_not_fill_blocks_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for sizes in ((33,), (16, 2), ()):
        with pytest.raises(FileFormatError, match=r"'w' .*expected.* 32"):
            _open(tmp_path / "bad.gguf", file_of([], [info("w", sizes, 8)], bytes(99)))


def _right() -> bytes:
    keys = [
        pair("general.architecture", 8, text("llama")),
        pair("tokenizer.tokens", 9, _array(8, 3, text("a") + text("bc") + text(""))),
        pair("numbers", 9, _array(6, 3, bytes(12))),
        pair("flag", 7, b"\1"),
    ]
    infos = [info("a", (4, 2)), info("b", (3,), 24, 32), info("c", (32,), 8, 64)]
    return file_of(keys, infos, bytes(range(98)))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    whole = _right()
    assert _open(tmp_path / "a.gguf", whole).entries.keys() == {"a", "b", "c"}
    for length in range(len(whole)):
        with pytest.raises(FileFormatError, match=r"file has|need more than"):
            _open(tmp_path / "a.gguf", whole[:length])


def test_keys_alone_are_checked_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(file_of([pair("k", 8, _U64(_HUGE))]))
    with pytest.raises(FileFormatError, match=f"takes {_HUGE} bytes"):
        taken_over(RangeFile(tmp_path / "a.gguf"))


def test_a_long_vocabulary_takes_no_memory(tmp_path: Path) -> None:
    tokens = b"".join(map(text, (f"token {number}" for number in range(200_000))))
    content = file_of([pair("tokens", 9, _array(8, 200_000, tokens))], [info("w", (1,))], bytes(4))
    (tmp_path / "a.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        reader = GgufReader(RangeFile(tmp_path / "a.gguf"))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert reader.metadata == {}


def _survives(path: Path, content: bytes) -> None:
    """Open it and read all that it claims to hold; nothing but an error of the family may come."""
    with contextlib.suppress(MechaError):
        reader = _open(path, content)
        for name, entry in reader.entries.items():
            assert entry.nbytes <= 8 * len(content)
            reader.read_into(name, 0, memoryview(bytearray(entry.nbytes)))
        reader.close()


_FLIPS = st.lists(st.tuples(st.integers(0, len(_right()) - 1), st.integers(0, 255)), min_size=1, max_size=6)
_NUMBERS = st.tuples(
    st.integers(0, len(_right()) - 8),
    st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1]),
)


def _fuzzed(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    quiet = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, suppress_health_check=quiet, database=None)


def _damage(flips: list[tuple[int, int]], number: tuple[int, int] | None, end: int) -> bytes:
    content = bytearray(_right())
    for at, value in flips:
        content[at] = value
    if number is not None:
        struct.pack_into("<Q", content, *number)
    return bytes(content[: len(content) - end])


@_fuzzed(400)
@given(_FLIPS, st.none() | _NUMBERS, st.integers(0, 40))
def test_damage_gives_errors_of_the_family(
    tmp_path: Path, flips: list[tuple[int, int]], number: tuple[int, int] | None, end: int
) -> None:
    pytest.importorskip("gguf")
    _survives(tmp_path / "a.gguf", _damage(flips, number, end))


@pytest.mark.slow
@_fuzzed(5_000)
@given(_FLIPS, st.none() | _NUMBERS, st.integers(0, 40))
def test_much_damage_gives_errors_of_the_family(
    tmp_path: Path, flips: list[tuple[int, int]], number: tuple[int, int] | None, end: int
) -> None:
    pytest.importorskip("gguf")
    _survives(tmp_path / "a.gguf", _damage(flips, number, end))
