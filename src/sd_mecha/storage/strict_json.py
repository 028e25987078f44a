"""JSON headers from untrusted files: one object, nothing ambiguous, nothing that costs more than its size."""

from __future__ import annotations

import json
import reprlib
from typing import Any, NoReturn

from sd_mecha.errors import FileFormatError

_MAX_DIGITS = 20  # of 2**64; longer numbers cost quadratic time and mean nothing in a header


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
        raw: the text, which starts with `{`; whitespace may follow it.
        source: what messages call the file.

    Raises:
        FileFormatError: naming the rule and what was found.
    """
    if not raw.startswith(b"{"):
        raise FileFormatError(
            f"{source}: header does not start with '{{': got {brief(raw[:16])}, expected a JSON object"
        )
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_short_int,
        )
        if b"\\ud" in raw or b"\\uD" in raw:  # half a surrogate pair is a str for Python but not text
            json.dumps(header, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        reason = f"header is not valid UTF-8: {error.reason} at byte {error.start}"
    except UnicodeEncodeError as error:
        reason = f"header holds an escape that is not valid Unicode: {error.reason}"
    except json.JSONDecodeError as error:
        reason = f"header is not valid JSON: {error.msg} at character {error.pos}"
    except _BadJsonError as error:
        reason = str(error)
    except RecursionError:
        reason = "header is nested too deeply, expected three levels"
    else:
        assert isinstance(header, dict)
        return header
    raise FileFormatError(f"{source}: {reason}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BadJsonError(f"header names a key twice: got {brief(key)} again, expected each once")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise _BadJsonError(f"header is not valid JSON: got {text}, expected a finite number")


def _short_int(text: str) -> int | float:
    if len(text) > _MAX_DIGITS:
        raise _BadJsonError(f"number too large in the header: got {len(text)} digits, expected at most {_MAX_DIGITS}")
    return -0.0 if text == "-0" else int(text)  # "-0" is no whole number for the reference reader
