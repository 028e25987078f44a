"""Damage that gets past the first check of a file.

A header that is changed no longer has the length that stands before it, and a member of an archive no longer has its
checksum. So half of the changes are made to what lies inside, and the file is put together again around it.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

from tests.faults.fuzz_gguf import gguf_parts, gguf_whole

Change = Callable[[bytes], bytes]

_NUMBERS = [
    *(0, 1, -1, 7, 8, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32),
    *(2**53, 2**60, 2**63 - 1, 2**64 - 1),
]
_WORDS = [
    *(b"0", b"-1", b"9" * 30, b"1e999", b"NaN", b"null", b'"', b"{", b"[" * 50),
    *(b"../", b"\\ud800", b"\n", b"\xff", b"&1"),
]
_VALUES: list[Any] = [None, True, -1, 1.5, 2**40, 2**63, "", "x", "\ud800", "../x", [], {}, [0], [[1]], {"x": 1}]
_OPCODES = [
    *(bytes([code]) for code in b"N)]}(.02lsuaetbR\x81\x85\x86\x87\x88\x89\x90\x91\x93\x94Q"),
    *(b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"M\x00\x10", b"h\x00", b"q\x00", b"\x8a\x08" + b"\xff" * 8),
    *(b"X\x01\x00\x00\x00a", b"\x8c\x01a", b"C\x01a", b"U\x01a", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n"),
    *(b"ccollections\nOrderedDict\n", b"cbuiltins\nset\n", b"cnumpy\ndtype\n", b"G" + b"\x7f\xf0" + b"\0" * 6),
    *(b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nfloat16\n"),
]


def damaged(kind: str, data: bytes, others: list[bytes], rng: random.Random, change: Change | None = None) -> bytes:
    """A file with one to eight changes.

    Args:
        kind: of the file.
        data: the file, which may be damaged already.
        others: files to take pieces from.
        rng: chooses.
        change: makes the change to what lies inside, if that is not another random one.
    """

    def at_random(part: bytes) -> bytes:
        return _scrambled(part, others, rng)

    inside = _INSIDE.get(kind)
    if inside is not None and (change is not None or rng.random() < 0.5):
        with contextlib.suppress(Exception):  # parsers of others find many words for a file that has no inside
            return inside(data, change or at_random, rng)
    return (change or at_random)(data)


def _scrambled(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = len(changed)
        # Headers are what readers interpret: most changes go there.
        at = rng.randrange(min(size, rng.choice((16, 64, 512, 4096, 1 << 30))) + 1)
        kind = rng.randrange(9)
        if kind == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < size:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            changed[at : at + rng.choice((4, 8))] = _number(rng)
        elif kind == 4:
            changed[at : at + rng.choice((0, 1, 4))] = rng.choice(_WORDS)
        elif kind == 5:
            del changed[at : at + rng.choice((1, 2, 8, 64, 1024))]
        elif kind == 6:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 64, 256))] * rng.choice((1, 2, 20))
        elif kind == 7:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            changed[at : at + rng.randrange(64)] = other[start : start + rng.randrange(64)]
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def _number(rng: random.Random) -> bytes:
    value = rng.choice(_NUMBERS)
    return struct.pack("<q", value) if -(2**63) <= value < 2**63 else struct.pack("<Q", value)


def _in_header(data: bytes, change: Change, rng: random.Random) -> bytes:
    """A safetensors file: the header, and the length in front of it."""
    end = 8 + int.from_bytes(data[:8], "little")
    if end > len(data):
        raise ValueError("no header")
    header = _json(data[8:end], rng) if rng.random() < 0.5 else change(data[8:end])
    return struct.pack("<Q", len(header)) + header + data[end:]


def _in_json(data: bytes, change: Change, rng: random.Random) -> bytes:
    return _json(data, rng) if rng.random() < 0.5 else change(data)


def _json(text: bytes, rng: random.Random) -> bytes:
    """JSON with one place of it taken away, replaced, doubled or renamed."""
    value = json.loads(text)
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        found = pending.pop()
        items = found.items() if type(found) is dict else enumerate(found) if type(found) is list else ()
        for key, part in items:
            places.append((found, key))
            pending.append(part)
    if not places:
        raise ValueError("nothing in it")
    for _ in range(rng.choice((1, 1, 2, 3))):
        found, key = rng.choice(places)
        if key not in (found if type(found) is dict else range(len(found))):
            continue
        old, way = found[key], rng.randrange(6)
        if way == 0:
            del found[key]
        elif way == 1:
            found[key] = rng.choice(_VALUES)
        elif way == 2 and type(found) is dict:
            names = [name for holder, name in places if type(holder) is dict]
            found[rng.choice((str(key) + "x", *names))] = found.pop(key)
        elif way == 3 and type(old) is int:
            found[key] = old + rng.choice((-8, -1, 1, 8, 1024, -old, rng.choice(_NUMBERS)))
        elif way == 4 and type(found) is list:
            found.insert(key, old)
        else:
            holder, name = rng.choice(places)
            if name in (holder if type(holder) is dict else range(len(holder))):
                found[key] = json.loads(json.dumps(holder[name]))
    return json.dumps(value, separators=(",", ":")).encode()


def _in_lines(data: bytes, change: Change, rng: random.Random) -> bytes:
    """A recipe: its lines and their words."""
    lines = [line.split(b" ") for line in data.split(b"\n")]
    for _ in range(rng.choice((1, 1, 2, 4))):
        rows = rng.choice((lines, rng.choice(lines)))
        _shuffled(rows, lines if rows is lines else rng.choice(lines), rng)
        if not lines:
            raise ValueError("nothing left")
    if rng.random() < 0.5:
        line = rng.choice(lines)
        if line:
            at = rng.randrange(len(line))
            line[at] = change(line[at])
    return b"\n".join(map(b" ".join, lines))


def _shuffled(items: list[Any], source: list[Any], rng: random.Random) -> None:
    """Take an item away, or put one of another place in or over it."""
    at, way = rng.randrange(len(items) + 1), rng.randrange(3)
    if way == 0:
        del items[at : at + 1]
    elif source:
        items[at : at + (way == 1)] = [rng.choice(source)]


def _in_checkpoint(data: bytes, change: Change, rng: random.Random) -> bytes:
    """An archive, of which one member is changed, mostly its pickle; or a row of pickles, as came before archives."""
    if data[:2] != b"PK":
        return _pickle(data, change, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[name, archive.read(name)] for name in archive.namelist()]
    member = rng.choice(members)
    if rng.random() < 0.8:
        member = next((one for one in members if one[0].endswith("data.pkl")), member)
        member[1] = _pickle(member[1], change, rng) if rng.random() < 0.7 else change(member[1])
    elif rng.random() < 0.5:
        member[1] = change(member[1])
    else:
        _shuffled(members, [[rng.choice(members)[0], member[1]], [member[0] + "x", member[1]]], rng)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)
    return whole.getvalue()


def _pickle(data: bytes, change: Change, rng: random.Random) -> bytes:
    """Pickles, one after the other, as a row of instructions of which a few are moved, replaced or changed."""
    starts, stream = [], io.BytesIO(data)
    try:
        while stream.tell() < len(data) and data[stream.tell()] == 0x80:
            starts += [at for _, _, at in pickletools.genops(stream) if at is not None]
    except ValueError:
        pass  # what follows is no pickle
    if not starts:
        raise ValueError("no pickle")
    end = stream.tell()
    parts = [data[at:until] for at, until in zip(starts, [*starts[1:], end], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not parts or rng.random() < 0.7:
            _shuffled(parts, rng.choice((parts, _OPCODES)), rng)
        else:
            at = rng.randrange(len(parts))
            argument = parts[at][1:]
            parts[at] = parts[at][:1] + (change(argument)[: len(argument)].ljust(len(argument)) if argument else b"")
    return b"".join(parts) + data[end:]


def _in_gguf(data: bytes, change: Change, rng: random.Random) -> bytes:
    """A GGUF file: its keys and tensors, and then their numbers and the padding."""
    keys, tensors, rest = gguf_parts(data)
    rows = rng.choice((keys, tensors))
    if rows and rng.random() < 0.6:
        at = rng.randrange(len(rows))
        name = 8 + int.from_bytes(rows[at][:8], "little")
        rows[at] = rows[at][:name] + change(rows[at][name:])
    else:
        _shuffled(rows, rng.choice((keys, tensors, rows)), rng)
    return gguf_whole(keys, tensors, rest)


_INSIDE: dict[str, Callable[[bytes, Change, random.Random], bytes]] = {
    "safetensors": _in_header,
    "index": _in_json,
    "mecha": _in_lines,
    "torch": _in_checkpoint,
    "gguf": _in_gguf,
}
