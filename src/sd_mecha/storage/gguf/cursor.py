"""Reading a GGUF header from front to back, in pieces of bounded size, without trusting any length in it."""

from __future__ import annotations

import struct
from typing import Any, NoReturn

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import ByteSource
from sd_mecha.storage.strict_json import brief

MAX_HEADER = 100_000_000
"""Bytes; vocabularies of language models, the largest things in headers, take a tenth of that."""
STRING, ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
_MAX_TEXT = 1 << 16  # bytes of a text that is kept
_MAX_NUMBERS = 16  # of an array that is kept
_PIECE = 1 << 18
_COUNT = _SCALARS[10]
_KIND = _SCALARS[4]

RECIPE = "mecha.recipe"
"""Key of the recipe that a file was made by."""
CHECKSUMS = "mecha.checksums"
"""Key of the checksums of its tensors, and of those that it was made from."""
WRITTEN = "mecha.dtypes"
"""Key of the dtypes, in one text, that the floats of a file had before they took the form in which it stores them."""
_MAX_TEXTS = {RECIPE: MAX_HEADER, CHECKSUMS: MAX_HEADER}  # where that is more


class Cursor:
    """A place in a header that moves on with every read.

    Args:
        source: the file.
    """

    def __init__(self, source: ByteSource) -> None:
        self.name = source.name
        self.position = 0
        self._source = source
        self._end = min(source.size, MAX_HEADER)
        self._base = 0
        self._window = b""

    @property
    def room(self) -> int:
        """How many bytes the header can still have."""
        return self._end - self.position

    def fail(self, problem: str) -> NoReturn:
        """Refuse the file."""
        raise FileFormatError(f"{self.name}: {problem}")

    def take(self, length: int) -> bytes:
        """The next bytes."""
        self._load(length)
        start = self.position - self._base
        self.position += length
        return self._window[start : start + length]

    def skip(self, length: int) -> None:
        """Move on without a look."""
        self._check(length)
        self.position += length

    def number(self) -> int:
        """The next 32 bits."""
        return int(self._unpack(_KIND))

    def count(self) -> int:
        """The next 64 bits."""
        return int(self._unpack(_COUNT))

    def text(self, longest: int, what: str) -> str:
        """The next string, of bounded length and valid UTF-8."""
        length = self.count()
        self._check(length)
        if length > longest:
            self.fail(f"{what} has {length} bytes, expected at most {longest}")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} {brief(raw)} is not valid UTF-8")

    def value(self, key: str) -> str | int | float | bool | tuple[int, ...] | None:
        """Move over the value of a key. What is small comes back, anything else is None."""
        kind = self.number()
        if kind in _SCALARS:
            found: Any = self._unpack(_SCALARS[kind])
            return found  # type: ignore[no-any-return]
        if kind == STRING:
            return self._small_text(_MAX_TEXTS.get(key, _MAX_TEXT))
        if kind == ARRAY:
            return self._array(key)
        self.fail(f"key {brief(key)} has a value of kind {kind}, which GGUF does not know; expected 0 to 12")

    def _small_text(self, longest: int) -> str | None:
        length = self.count()
        if length > longest:
            self.skip(length)
            return None
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            return None  # it is copied as it is, and not understood

    def _array(self, key: str) -> tuple[int, ...] | None:
        kind, count = self.number(), self.count()
        if kind == STRING:
            self._skip_strings(key, count)
            return None
        if kind not in _SCALARS:
            what = "arrays within arrays, which other readers refuse too" if kind == ARRAY else f"values of kind {kind}"
            self.fail(f"key {brief(key)} has an array of {what}; expected numbers or strings")
        form = _SCALARS[kind]
        self._check(count * form.size, f"{count} numbers of key {brief(key)}")
        if count > _MAX_NUMBERS or kind not in _INTEGERS:
            self.skip(count * form.size)
            return None
        return tuple(self._unpack(form) for _ in range(count))

    def _skip_strings(self, key: str, count: int) -> None:
        """Move over strings quickly: there are hundreds of thousands of them in a vocabulary."""
        self._check(count * _COUNT.size, f"{count} strings of key {brief(key)}")
        unpack = _COUNT.unpack_from
        while count:
            self._load(_COUNT.size)
            window, at = self._window, self.position - self._base
            last = len(window) - _COUNT.size
            while count and at <= last:
                at += _COUNT.size + unpack(window, at)[0]
                count -= 1
            self.position = self._base + at
            if self.position > self._end:
                self.fail(f"strings of key {brief(key)} reach to byte {self.position}; {self._limit()}")

    def _unpack(self, form: struct.Struct) -> Any:
        self._load(form.size)
        start = self.position - self._base
        self.position += form.size
        return form.unpack_from(self._window, start)[0]

    def _load(self, length: int) -> None:
        """Have the next bytes in the window."""
        self._check(length)
        start = self.position - self._base
        if not 0 <= start <= len(self._window) - length:
            self._window = self._source.read(self.position, min(max(length, _PIECE), self.room))
            self._base = self.position

    def _check(self, length: int, what: str = "what comes") -> None:
        if length > self.room:
            self.fail(f"{what} at byte {self.position} of the header takes {length} bytes; {self._limit()}")

    def _limit(self) -> str:
        if self._end < self._source.size:
            return f"a header has at most {MAX_HEADER}"
        return f"the file has {self._source.size}: it is damaged, or was not downloaded completely; fetch it again"
