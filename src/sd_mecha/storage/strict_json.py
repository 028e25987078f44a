"""JSON from untrusted files: one object, nothing ambiguous, nothing that costs more than its size."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any, NoReturn

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.foreign import BEFORE_TEXT

_MAX_MEMORY = 480_000_000  # bytes; 100,000 tensors and what is known of them take about 250 million
_VALUE = 150  # bytes per value at most, for the objects, the tables they are in, and what a reader makes of them
_MAX_DIGITS = 20  # of 2**64; longer numbers cost quadratic time and mean nothing here
# Behind an even number of backslashes, as those of a JSON text within a text are none.
_ESCAPE = re.compile(rb"\\(?<!\\\\)(?:\\\\)*u")
_SURROGATE = re.compile(rb"\\(?<!\\\\)(?:\\\\)*u[dD][89a-fA-F]")


class _Brief(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:  # the library would show them whole, and then cut that
        return repr(value) if len(value) <= self.maxother else f"{value[: self.maxother]!r}..."


_brief = _Brief()
_brief.maxstring = _brief.maxother = 120
_brief.maxlist = 12
brief = _brief.repr
"""A repr of bounded size and depth, for showing values of unknown origin."""


class _BadJsonError(ValueError):
    """Python's parser accepts it, we do not."""


def parse_object(raw: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object strictly: valid UTF-8, no key twice, no NaN or Infinity, no huge numbers.

    Args:
        raw: the text; a byte order mark and white space may stand before it, and white space after it.
        source: what messages call the file.

    Raises:
        FileFormatError: naming the rule and what was found.
    """
    raw = raw.lstrip(BEFORE_TEXT)
    if not raw.startswith(b"{"):
        raise FileFormatError(f"{source}: does not start with '{{': got {brief(raw[:16])}, expected a JSON object")
    _check_memory(raw, source)
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_short_int,
        )
        if _has_surrogates(raw):  # half a pair is a str for Python but not text
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        reason = f"not valid UTF-8: {error.reason} at byte {error.start}"
    except UnicodeEncodeError as error:
        reason = f"holds an escape that is not valid Unicode: {error.reason}"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at character {error.pos}"
    except _BadJsonError as error:
        reason = str(error)
    except RecursionError:
        reason = "nested too deeply"
    else:
        assert isinstance(found, dict)
        return found
    raise FileFormatError(f"{source}: {reason}")


def _check_memory(raw: bytes, source: str) -> None:
    """Refuse what would take far more memory than there are bytes, before any of it is taken."""
    values = sum(map(raw.count, (b",", b":", b"[", b"{")))
    # Those of a JSON text within a text, such as checksums, are none: a single backslash stands before its quotes.
    values -= sum(raw.count(b'\\"' + mark) - raw.count(b'\\\\"' + mark) for mark in (b",", b":"))
    width = 1  # bytes that a character may take in memory: one wide character makes all of its text wide
    if _has_surrogates(raw) or (not raw.isascii() and re.search(rb"[\xf0-\xff]", raw)):
        width = 4
    elif not raw.isascii() or (b"\\u" in raw and _ESCAPE.search(raw)):
        width = 2
    needed = len(raw) * (1 + 3 * width) + values * _VALUE
    if needed > _MAX_MEMORY:
        raise FileFormatError(
            f"{source}: too large: {values} values in {len(raw)} bytes may take {needed} bytes of memory; "
            f"expected at most {_MAX_MEMORY}"
        )


def _has_surrogates(raw: bytes) -> bool:
    return (b"\\ud" in raw or b"\\uD" in raw) and _SURROGATE.search(raw) is not None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BadJsonError(f"names a key twice: got {brief(key)} again, expected each once")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise _BadJsonError(f"not valid JSON: got {text}, expected a finite number")


def _short_int(text: str) -> int | float:
    if len(text) > _MAX_DIGITS:
        raise _BadJsonError(f"number too large: got {len(text)} digits, expected at most {_MAX_DIGITS}")
    return -0.0 if text == "-0" else int(text)  # "-0" is no whole number for the reference reader
