r"""The smallest pieces of a `.mecha` text: how values are written, how a line falls into tokens.

Tokens are separated by spaces. One is `value` or `name=value`; a value is a number, `null`, `true`, `false`,
a reference `&N` or a `"quoted string"`, a name is bare or quoted. A backslash takes the meaning from the
character after it, except that `\n`, `\r`, `\t` and `\uXXXX` stand for what they do in Python. Release 1.1.8
knew neither those nor quoted names nor hexadecimal integers: they are written where nothing else would do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from sd_mecha.errors import RecipeSyntaxError

# Line breaks (all that `str.splitlines` splits on, and what a text file may turn into another) and lone
# surrogates, which no file can hold.
_UNSAFE = r"\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029\ud800-\udfff"
_QUOTED_ESCAPES = re.compile(rf'["\\{_UNSAFE}]')
_BARE_ESCAPES = re.compile(r'[ "\\]')
_NEEDS_QUOTES = re.compile(rf"[={_UNSAFE}]")
_ESCAPED = {"\n": r"\n", "\r": r"\r", '"': r"\"", "\\": r"\\", " ": r"\ "}
_UNESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.?)", re.DOTALL)
_DROPPED = re.compile(r"\\(.?)", re.DOTALL)
_UNESCAPED = {"n": "\n", "r": "\r", "t": "\t"}
_HEXADECIMAL = re.compile(r"[+-]?0[xX][0-9a-fA-F]")
# About 4,200 digits: Python refuses decimals of more than 4,300, and they take quadratic time.
_DECIMAL_BITS = 14_000

SUFFIX = ".mecha"
"""What the names of recipe files end in."""

_TOKEN = re.compile(
    r"""
    (?:
        (?: "(?P<quoted_name> [^"\\]* (?:\\.[^"\\]*)* )"
          | (?P<bare_name> (?: (?:[^\ ="\\]|\\[^=]) (?:[^\ =\\]|\\[^=])* )? ) \\?
        ) =
    )?
    (?: "(?P<string> [^"\\]* (?:\\.[^"\\]*)* )"
      | (?P<bare> (?: (?:[^\ "\\]|\\.?) (?:[^\ \\]|\\.?)* )? )
    )
    """,
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """One token: `name` is None for a positional one; either `string` or `bare` holds the value."""

    name: str | None
    string: str | None
    bare: str
    column: int
    value_column: int


class Ref(int):
    """Index of the instruction that a `&N` refers to."""


Scalar = bool | int | float | str | None


def split_line(line: str, start: int, number: int) -> Iterator[Token]:
    """Split a line into tokens.

    Args:
        line: the line.
        start: where in it the arguments begin.
        number: its number in the text, for messages.

    Raises:
        RecipeSyntaxError: a quote is not closed, or a name has no value.
    """
    end = len(line)
    while start < end:
        if line[start] == " ":
            start += 1
            continue
        match = _TOKEN.match(line, start)
        assert match is not None  # every part of the pattern may be empty
        quoted_name, bare_name, string, bare = match.groups()
        begin, start = start, match.end()
        if string is None and not bare:
            if start < end and line[start] == '"':
                raise RecipeSyntaxError(
                    'this quote is not closed; a quote inside a string is written \\"',
                    line=number, column=start + 1, source=shown(line),
                )  # fmt: skip
            raise RecipeSyntaxError("a value is missing after '='", line=number, column=start + 1, source=shown(line))
        name = bare_name if quoted_name is None else quoted_name
        value_start = match.start("bare") if string is None else match.start("string") - 1
        yield Token(
            None if name is None else unescape(name),
            None if string is None else unescape(string),
            bare or "",
            begin + 1,
            value_start + 1,
        )


def parse_bare(text: str) -> Scalar | Ref:
    """Read an unquoted value.

    Raises:
        ValueError: it is none; the message says what was expected.
    """
    if "\\" in text:  # no value needs an escape, so none of the letters has a meaning here
        text = _DROPPED.sub(r"\1", text)
    if text.startswith("&"):
        try:
            return Ref(text[1:])
        except ValueError:
            raise ValueError(f"{text[:40]!r} is no reference: '&' is followed by a number") from None
    if text in _WORDS:
        return _WORDS[text]
    try:
        return int(text)
    except ValueError:
        pass
    if _HEXADECIMAL.match(text):
        try:
            return int(text, 16)
        except ValueError:
            raise ValueError(f"cannot read {text[:40]!r}: it is no hexadecimal number") from None
    if len(text) > 640 and text.lstrip("+-").isdecimal():
        raise ValueError(f"a decimal number of {len(text)} digits is too long: write it in hexadecimal, 0x...")
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"cannot read {text[:40]!r}: expected null, true, false, a number, a reference such as &0 or a "
            '"quoted string", with spaces and no tabs between values'
        ) from None


_WORDS: dict[str, bool | None] = {"null": None, "true": True, "false": False}


def format_scalar(value: Scalar) -> str:
    """Write a value that is neither a node nor a tensor."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quote(str.__str__(value))
    if isinstance(value, float):
        return float.__repr__(value)
    if value.bit_length() > _DECIMAL_BITS:
        return hex(value)
    try:
        return int.__repr__(value)
    except ValueError:  # the process allows fewer digits than usual
        return hex(value)


def quote(text: str) -> str:
    """Write a string, in quotes."""
    return f'"{_QUOTED_ESCAPES.sub(_escape, text)}"'


def format_name(name: str) -> str:
    """Write the name before a `=`: bare wherever release 1.1.8 could read that."""
    return quote(name) if _NEEDS_QUOTES.search(name) else _BARE_ESCAPES.sub(_escape, name)


def unescape(text: str) -> str:
    """Undo the escapes of a string or name."""
    return _UNESCAPE.sub(_unescape, text) if "\\" in text else text


def shown(line: str) -> str:
    """Return a line as messages show it: a tab as wide as the caret below takes it for."""
    return line.replace("\t", " ")


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    return _ESCAPED.get(char) or f"\\u{ord(char):04x}"


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else _UNESCAPED.get(code, code)
