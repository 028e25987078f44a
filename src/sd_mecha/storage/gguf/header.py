"""The header of a GGUF file: what the file says of its model, and where its tensors lie.

    magic, version, number of tensors, number of keys
    keys:     name, kind, value
    tensors:  name, sizes (the last one of torch first), kind, offset from the start of the data
    padding up to a multiple of the alignment, then the data

The rules are those of llama.cpp, so that a file which is read here is read elsewhere, except that names may be longer,
that there may be more than four sizes, and that there may be holes between tensors: image models have such files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import ByteSource
from sd_mecha.storage.gguf.cursor import MAX_HEADER, Cursor
from sd_mecha.storage.gguf.kinds import Kind, kind_of
from sd_mecha.storage.strict_json import brief

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""Of the data of a file that says nothing else."""
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""What keys begin with that give the shape of a tensor which the format could not hold as it was."""
_MAX_KEYS = 100_000
_MAX_TENSORS = 1_000_000
_MAX_NAME = (1 << 16) - 1
_MAX_SIZES = 8
_MAX_ELEMENTS = 2**63 - 1  # torch counts them in int64
_LEAST_KEY = 8 + 1 + 4 + 1
_LEAST_TENSOR = 8 + 1 + 4 + 4 + 8

Value = str | int | float | bool | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Keys:
    """What a file says of its model.

    Attributes:
        places: key -> where it lies in the file with its value: offset and length.
        values: those that are small: texts, numbers, and short arrays of whole numbers.
    """

    places: Mapping[str, tuple[int, int]]
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the file, and as what.

    Attributes:
        shape: as torch has it.
        kind: how its numbers are stored.
        offset: from the start of the file.
        nbytes: how many bytes it takes there.
    """

    shape: tuple[int, ...]
    kind: Kind
    offset: int
    nbytes: int


def read_keys(source: ByteSource) -> Keys:
    """The keys of a file, and not its tensors.

    Raises:
        FileFormatError: the file breaks a rule.
    """
    cursor = Cursor(source)
    _, count = _begin(cursor)
    return _keys(cursor, count)


def read_header(source: ByteSource) -> tuple[Keys, dict[str, Place]]:
    """The keys and the tensors of a file, the tensors in the order of their data.

    Raises:
        FileFormatError: the file breaks a rule, or a tensor is of a kind that nobody knows.
        UnknownFormatError: a tensor is of a kind that only the gguf package knows, and that is not installed.
    """
    cursor = Cursor(source)
    tensors, count = _begin(cursor)
    keys = _keys(cursor, count)
    alignment = _alignment(cursor, keys.values)
    found: dict[str, Place] = {}
    for _ in range(tensors):
        name, place = _tensor(cursor, alignment, keys.values)
        if name in found:
            cursor.fail(f"tensor {brief(name)} is there twice, expected each name once")
        found[name] = place
    data = -(-cursor.position // alignment) * alignment
    places = {
        name: Place(place.shape, place.kind, data + place.offset, place.nbytes)
        for name, place in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    }
    _check_places(cursor, places, source.size)
    _check_parts(cursor, keys.values, len(places))
    return keys, places


def _begin(cursor: Cursor) -> tuple[int, int]:
    """The numbers of tensors and of keys."""
    magic = cursor.take(4)
    if magic != MAGIC:
        cursor.fail(f"is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}")
    version = cursor.number()
    if version and not version & 0xFFFF:
        cursor.fail("is a big-endian GGUF file; convert it to little-endian with gguf-convert-endian first")
    if version not in (2, VERSION):
        cursor.fail(f"is GGUF of version {version}, expected 2 or {VERSION}; convert it with a current llama.cpp")
    tensors, keys = cursor.count(), cursor.count()
    for count, what, most, least in (
        (tensors, "tensors", _MAX_TENSORS, _LEAST_TENSOR),
        (keys, "keys", _MAX_KEYS, _LEAST_KEY),
    ):
        if count > most:
            cursor.fail(f"claims to have {count} {what}, expected at most {most}")
        if count * least > cursor.room:
            cursor.fail(f"claims to have {count} {what}, which need more than the {cursor.room} bytes that follow")
    return tensors, keys


def _keys(cursor: Cursor, count: int) -> Keys:
    places: dict[str, tuple[int, int]] = {}
    values: dict[str, Value] = {}
    for _ in range(count):
        start = cursor.position
        key = cursor.text(_MAX_NAME, "a key")
        if key in places:
            cursor.fail(f"key {brief(key)} is there twice, expected each once")
        value = cursor.value(key)
        places[key] = start, cursor.position - start
        if value is not None:
            values[key] = value
    return Keys(places, values)


def _alignment(cursor: Cursor, values: Mapping[str, Value]) -> int:
    alignment = values.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_HEADER or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {brief(alignment)}, expected a power of two")
    return alignment


def _tensor(cursor: Cursor, alignment: int, values: Mapping[str, Value]) -> tuple[str, Place]:
    """The next tensor; its offset is from the start of the data."""
    name = cursor.text(_MAX_NAME, "the name of a tensor")
    count = cursor.number()
    if count > _MAX_SIZES:
        cursor.fail(f"tensor {brief(name)} has {count} dimensions, expected at most {_MAX_SIZES}")
    sizes = tuple(cursor.count() for _ in range(count))
    if math.prod(size or 1 for size in sizes) > _MAX_ELEMENTS:
        cursor.fail(f"tensor {brief(name)} of sizes {sizes} has more elements than any tensor can")
    number, offset = cursor.number(), cursor.count()
    kind = kind_of(number, f"{cursor.name}: tensor {brief(name)}")
    if sizes and sizes[0] % kind.block:
        cursor.fail(f"tensor {brief(name)} has rows of {sizes[0]}, expected a multiple of {kind.block} for {kind.name}")
    if not sizes and kind.block > 1:
        cursor.fail(f"tensor {brief(name)} of one number is stored as {kind.name}, expected rows of {kind.block}")
    if offset % alignment:
        cursor.fail(f"tensor {brief(name)} is at offset {offset}, expected a multiple of the alignment {alignment}")
    elements = math.prod(sizes)
    shape = sizes[::-1]
    if ORIGINAL_SHAPE + name in values:
        shape = _original(cursor, name, values[ORIGINAL_SHAPE + name], elements)
    return name, Place(shape, kind, offset, elements // kind.block * kind.nbytes)


def _original(cursor: Cursor, name: str, shape: Value, elements: int) -> tuple[int, ...]:
    """The shape that a tensor had before it was brought into one that the format can hold."""
    sizes = shape if isinstance(shape, tuple) else (-1,)
    extent = math.prod(size or 1 for size in sizes)  # zeros do not excuse the others: torch multiplies strides
    if min(sizes, default=0) >= 0 and math.prod(sizes) == elements and extent <= _MAX_ELEMENTS:
        return sizes
    cursor.fail(f"{ORIGINAL_SHAPE}{name} is {brief(shape)}, expected a shape of {elements} elements")


def _check_places(cursor: Cursor, places: Mapping[str, Place], size: int) -> None:
    end, before = 0, ""
    for name, place in places.items():
        if place.offset < end:
            cursor.fail(f"tensor {brief(name)} at byte {place.offset} overlaps {brief(before)}, which ends at {end}")
        end, before = place.offset + place.nbytes, name
        if end > size:
            raise FileFormatError(
                f"{cursor.name}: tensor {brief(name)} reaches to byte {end}, but the file has {size}; "
                "it is damaged, or was not downloaded completely: fetch it again"
            )


def _check_parts(cursor: Cursor, values: Mapping[str, Value], tensors: int) -> None:
    parts, total = values.get("split.count", 1), values.get("split.tensors.count", tensors)
    if parts != 1 and total != tensors:
        cursor.fail(
            f"is one of {brief(parts)} parts and has {tensors} of {brief(total)} tensors; "
            "join them with llama-gguf-split --merge first"
        )
