"""Taking a GGUF file apart, and putting the parts together."""

from __future__ import annotations

import struct

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


def gguf_parts(data: bytes) -> tuple[list[bytes], list[bytes], bytes]:
    """The keys with their values, the tensors with their places, and the data.

    Raises:
        ValueError, struct.error: the file is too broken.
    """
    _, _, tensors, keys = struct.unpack_from("<4sIQQ", data)
    if max(tensors, keys) > 1000:
        raise ValueError("too many")
    rows, at = [], 24
    for number in range(keys + tensors):
        end = _key_end(data, at) if number < keys else _tensor_end(data, at)
        if end > len(data):
            raise ValueError("it ends before its header")
        rows.append(data[at:end])
        at = end
    return rows[:keys], rows[keys:], data[-(-at // _ALIGNMENT) * _ALIGNMENT :]


def gguf_whole(keys: list[bytes], tensors: list[bytes], rest: bytes) -> bytes:
    """The file of such parts."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % _ALIGNMENT) + rest


def _text_end(data: bytes, at: int) -> int:
    return int(at + 8 + struct.unpack_from("<Q", data, at)[0])


def _key_end(data: bytes, at: int) -> int:
    at = _text_end(data, at)
    (kind,) = struct.unpack_from("<I", data, at)
    return _value_end(data, at + 4, kind)


def _value_end(data: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return _text_end(data, at)
    if kind != _ARRAY:
        return at + _SIZES.get(kind, 1)
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind != _STRING:
        return int(at + count * _SIZES.get(kind, 1))
    for _ in range(min(count, 1000)):
        at = _text_end(data, at)
    return at


def _tensor_end(data: bytes, at: int) -> int:
    at = _text_end(data, at)
    (count,) = struct.unpack_from("<I", data, at)
    return int(at + 4 + 8 * count + 12)
