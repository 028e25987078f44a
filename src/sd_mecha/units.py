"""How sizes, durations and lists of names are read from people and written for them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[_letter] = _UNITS[f"{_letter}IB"] = 1024**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Number of bytes that a text such as 512MB, 1.5 GiB or 4096 means.

    KB, MB, GB, TB are powers of 1000; KiB ... TiB, and K, M, G, T alone, are powers of 1024.

    Raises:
        ValueError: the text is no size.

    >>> parse_size("512MB"), parse_size("1.5 GiB"), parse_size("64k")
    (512000000, 1610612736, 65536)
    """
    match = _SIZE.fullmatch(text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write for instance 512MB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format_size(size: float) -> str:
    """A size for people to read, in powers of 1000.

    >>> format_size(2132696762), format_size(-1536), format_size(0)
    ('2.13 GB', '-1.54 kB', '0 B')
    """
    magnitude = abs(size)
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if magnitude >= scale * 0.9995:
            return f"{size / scale:.3g} {unit}" if magnitude < scale * 999.5 else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """A duration for people to read.

    >>> format_seconds(0.0123), format_seconds(9.87), format_seconds(75.2)
    ('12 ms', '9.9 s', '1 min 15 s')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def such_as(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, for a message about all of them.

    >>> such_as(["a", "b", "c", "d"])
    "such as 'a', 'b', 'c'"
    """
    return "such as " + ", ".join(map(repr, names[:most]))
