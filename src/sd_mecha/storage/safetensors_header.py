"""The header of a safetensors file: pure functions between bytes and entries.

A file is 8 bytes of header length (little endian), the header (a JSON object), then the data. Each entry
gives dtype, shape and the byte range of one tensor within the data; the ranges cover the data exactly,
without holes or overlaps. A file that breaks a rule is refused before any of its data is used: numbers taken
from the wrong place look like numbers. The rules are those of the reference implementation, plus three where
it is silent: the header starts with `{`, no key occurs twice, and no shape overflows, not even one without
elements.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.dtypes import FLOAT4, FORMAT_NAMES, FROM_SAFETENSORS, TO_SAFETENSORS
from sd_mecha.storage.foreign import describe_foreign
from sd_mecha.storage.strict_json import brief, parse_object

PREFIX_SIZE = 8
MAX_HEADER_SIZE = 100_000_000
METADATA_KEY = "__metadata__"
_MAX_BYTES = 2**63 - 1  # torch counts elements and strides in int64


def header_size(head: bytes, file_size: int, source: str) -> int:
    """Length of the header, from the first bytes of the file.

    Args:
        head: the first bytes (8, or more so that foreign files are recognised).
        file_size: size of the whole file.
        source: what messages call the file.

    Raises:
        FileFormatError: the file cannot hold such a header.
    """
    length = struct.unpack_from("<Q", head)[0] if len(head) >= PREFIX_SIZE else None
    if length is None or length > MAX_HEADER_SIZE:  # text and archives give lengths beyond all bounds
        foreign = describe_foreign(head)
        if foreign is not None:
            raise FileFormatError(f"{source}: is not a safetensors file but {foreign}")
    room = file_size - PREFIX_SIZE
    if length is None:
        problem = f"file too short: got {file_size} bytes, expected at least {PREFIX_SIZE} of header length"
    elif length > MAX_HEADER_SIZE:
        problem = f"header too large: got {length} bytes, expected at most {MAX_HEADER_SIZE}"
    elif length > room:
        problem = f"header longer than the file: got {length} bytes, expected at most the {room} that follow"
        raise FileFormatError(f"{source}: {problem}; the file is truncated, fetch it again")
    elif length < 2:
        problem = f"header too short: got {length} bytes, expected a JSON object"
    else:
        return int(length)
    raise FileFormatError(
        f"{source}: this is no safetensors file, or a damaged one: {problem}; download it again, or check what it is"
    )


def parse_header(raw: bytes, data_size: int, source: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read a header, checking every rule.

    Args:
        raw: the header without its length prefix.
        data_size: how many bytes follow it in the file.
        source: what messages call the file.

    Returns:
        Entries in the order of their data, which they fill without gaps from byte 0, and the metadata.

    Raises:
        FileFormatError: naming file, key, rule, what was found and what was expected.
    """
    if not raw.startswith(b"{"):
        raise FileFormatError(
            f"{source}: header does not start with '{{': got {brief(raw[:16])}, expected a JSON object"
        )
    header = parse_object(raw, f"{source}: header")
    metadata = _check_metadata(header.pop(METADATA_KEY, None), source)
    ranges = []
    entries = {}
    for name, fields in header.items():
        if type(fields) is not dict:
            _fail(source, name, "entry is not an object", fields, "dtype, shape and data_offsets in one")
        for field in ("dtype", "shape", "data_offsets"):
            if field not in fields:
                _fail(source, name, "field missing", sorted(fields), repr(field))
        entry, nbytes = _check_shape(source, name, fields["dtype"], fields["shape"])
        begin, end = _check_offsets(source, name, fields["data_offsets"])
        if end - begin != nbytes:
            rule = "data_offsets do not match shape and dtype"
            expected = f"{nbytes} for {fields['dtype']} {brief(fields['shape'])}"
            _fail(source, name, rule, f"{end - begin} bytes", expected, raw=True)
        entries[name] = entry
        ranges.append((begin, end, name))
    # The stable sort keeps the header's order among 0-element tensors that share an offset.
    ranges.sort(key=lambda item: item[:2])
    _check_cover(source, ranges, data_size)
    return {name: entries[name] for _, _, name in ranges}, metadata


def build_header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The header, unpadded, for tensors that lie one after the other in this order.

    Raises:
        ValueError: a dtype, name or metadata value that the format cannot hold.
    """
    header: dict[str, Any] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(f"metadata must map str to str, got {brief(key)}: {brief(value)}")
        header[METADATA_KEY] = dict(metadata)
    offset = 0
    for name, entry in entries.items():
        if name == METADATA_KEY:
            raise ValueError(f"a tensor cannot be named {METADATA_KEY!r}: that name is for metadata")
        dtype = TO_SAFETENSORS.get(entry.dtype)
        if dtype is None:
            raise ValueError(f"tensor {name!r}: the format has no dtype for {entry.dtype}; cast it first")
        end = offset + entry.nbytes
        header[name] = {"dtype": dtype, "shape": _file_shape(name, entry), "data_offsets": (offset, end)}
        offset = end
    try:
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a name or metadata value holds text that is not valid Unicode: {error}") from error
    if len(raw) + PREFIX_SIZE > MAX_HEADER_SIZE:
        raise ValueError(f"the header would have {len(raw)} bytes; the format allows {MAX_HEADER_SIZE}")
    return raw


def _check_metadata(value: Any, source: str) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is not dict:
        _fail_metadata(source, value, "an object")
    for key, text in value.items():
        if type(text) is not str:
            _fail_metadata(source, f"{brief(key)}: {brief(text)}", "text for every key")
    return value


def _check_shape(source: str, name: str, dtype: Any, shape: Any) -> tuple[TensorEntry, int]:
    torch_dtype = FROM_SAFETENSORS.get(dtype) if type(dtype) is str else None
    if torch_dtype is None:
        if type(dtype) is str and dtype in FORMAT_NAMES:
            _fail(source, name, "dtype without a torch counterpart", dtype, "one that the installed torch has")
        _fail(source, name, "unknown dtype", dtype, "one of " + ", ".join(FROM_SAFETENSORS))
    if type(shape) is not list:
        _fail(source, name, "shape is not a list", shape, "a list of whole numbers")
    extent = torch_dtype.itemsize
    for size in shape:
        if type(size) is not int or size < 0:
            _fail(source, name, "bad size in shape", shape, "whole numbers, zero or more")
        extent *= size or 1  # zeros do not excuse the others: torch multiplies strides all the same
        if extent > _MAX_BYTES:
            _fail(source, name, "shape too large", shape, f"at most {_MAX_BYTES} bytes")
    if torch_dtype is FLOAT4:
        if not shape or shape[-1] % 2:
            _fail(source, name, "F4 values do not fill whole bytes", shape, "an even last size")
        shape = [*shape[:-1], shape[-1] // 2]
    entry = TensorEntry(tuple(shape), torch_dtype)
    return entry, entry.nbytes


def _file_shape(name: str, entry: TensorEntry) -> tuple[int, ...]:
    if entry.dtype is not FLOAT4:
        return entry.shape
    if not entry.shape:
        raise ValueError(f"tensor {name!r}: the safetensors format holds no 0-d tensor of {entry.dtype}")
    return (*entry.shape[:-1], entry.shape[-1] * 2)


def _check_offsets(source: str, name: str, offsets: Any) -> tuple[int, int]:
    if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
        _fail(source, name, "bad data_offsets", offsets, "[begin, end]")
    begin, end = offsets
    if not 0 <= begin <= end:
        _fail(source, name, "data_offsets out of order", offsets, "0 <= begin <= end")
    return begin, end


def _check_cover(source: str, ranges: list[tuple[int, int, str]], data_size: int) -> None:
    covered, before = 0, ""
    for begin, end, name in ranges:
        if begin < covered:
            got = f"begin {begin} inside tensor {brief(before)}"
            _fail(source, name, "data_offsets overlap", got, f"begin {covered}", raw=True)
        if begin > covered:
            _fail(source, name, "hole in the data before it", f"begin {begin}", f"begin {covered}", raw=True)
        if end > data_size:
            tail = f"an end within the {data_size} bytes of data; the file is truncated, fetch it again"
            _fail(source, name, "data_offsets beyond the end of the file", f"end {end}", tail, raw=True)
        covered, before = end, name
    if covered < data_size:
        raise FileFormatError(
            f"{source}: data longer than the tensors: got {data_size} bytes of data, expected {covered} "
            "as the header says"
        )


def _fail(source: str, name: str, rule: str, got: Any, expected: str, *, raw: bool = False) -> NoReturn:
    shown = got if raw else brief(got)
    raise FileFormatError(f"{source}: tensor {brief(name)}: {rule}: got {shown}, expected {expected}")


def _fail_metadata(source: str, got: Any, expected: str) -> NoReturn:
    shown = got if isinstance(got, str) else brief(got)
    raise FileFormatError(f"{source}: {METADATA_KEY} is not a map from text to text: got {shown}, expected {expected}")
