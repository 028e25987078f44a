"""What of an unfinished output is complete: a file beside it, so that a later run need not do it again.

The first line says what the output is made of, and how it is laid out. Each of the others is about one tensor, and is
written when the bytes of that tensor are on the disk: ["name", checksum of a sample of it], ["name", null] for one that
the output lacks, ["name", false] for one that has to be made again after all, ["name", checksum, offset] for one that
was moved and lies there from then on. A line that was not written to its end counts for nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sd_mecha.storage.disk import sync_folder

_logger = logging.getLogger("sd_mecha")

VERSION = 2
_BLOCK = 16 << 10
_BLOCKS = 4
_MAX_SIZE = 1 << 30
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)

Line = tuple[str, int | None] | tuple[str, int, int]


class Journal:
    """The journal of one temporary file. Whoever uses it holds the lock on that file.

    Args:
        path: where it lies.
        output: what messages call the output.
        fingerprint: what the output is made of.
        layout: what tells where its tensors lie.
    """

    def __init__(self, path: str, output: str, fingerprint: str, layout: str) -> None:
        self.path = path
        self._output = output
        self._head = {"version": VERSION, "fingerprint": fingerprint, "layout": layout}
        self._descriptor = -1
        self._end = 0  # bytes of what was read and understood
        self.done: dict[str, int | None] = {}
        self.moved: dict[str, int] = {}
        """Where tensors lie that an earlier run has moved, complete or not."""

    def fits(self) -> bool:
        """Read it, and tell whether the temporary file beside it is of the same output; the log says why not."""
        try:
            lines = self._read()
        except OSError as error:
            return self._afresh(f"there is no journal of what is complete ({error.strerror})")
        head = next(lines, None)
        if type(head) is not dict or head.get("version") != VERSION:
            return self._afresh("the journal of what is complete was not begun")
        if head != self._head:
            return self._afresh("the recipe, an input or an option changed")
        for line in lines:
            match line:
                case [str(name), bool()]:
                    self.done.pop(name, None)
                case [str(name), int() | None as sample]:
                    self.done[name] = sample
                case [str(name), int(sample), int(offset)]:
                    self.done[name], self.moved[name] = sample, offset
                case _:
                    break
        return True

    def begin(self, kept: bool) -> None:
        """Open it for writing: behind what was read if the temporary file is kept, else a new one."""
        if kept:
            self._descriptor = os.open(self.path, os.O_WRONLY | _FLAGS)
            return
        self.done, self.moved = {}, {}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
        self._end = 0
        self._write([self._head])

    def append(self, lines: Sequence[Line]) -> None:
        """Add lines and make them durable; what they are about is durable already.

        Where that fails, the output goes on without: only an interruption later costs more.
        """
        if self._descriptor < 0:
            return
        try:
            self._write(lines)
            self.done.update((line[0], line[1]) for line in lines)
        except OSError as error:
            _logger.warning(
                "%s: cannot be written: %s; what is made from now on is not kept", self.path, error.strerror
            )
            self.close()

    def revoke(self, names: Iterable[str]) -> None:
        """Tensors that are about to be overwritten do not count as complete any more, whatever happens next.

        Raises:
            OSError: neither can that be written nor the journal removed.
        """
        lines = [(name, False) for name in names]
        if not lines:
            return
        for name, _ in lines:
            self.done.pop(name, None)
        try:
            if self._descriptor < 0:
                raise OSError("closed")
            self._write(lines)
        except OSError:
            self.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            sync_folder(os.path.dirname(self.path))

    def close(self) -> None:
        """Write no more; the file stays."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _write(self, lines: Iterable[Any]) -> None:
        data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        os.ftruncate(self._descriptor, self._end)  # a line that was torn, or what an interrupted call has written
        os.lseek(self._descriptor, self._end, os.SEEK_SET)
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fsync(self._descriptor)
        self._end += len(data)

    def _read(self) -> Any:
        """Its lines one after the other, up to the first that is none; `_end` is behind those that were taken."""
        descriptor = os.open(self.path, os.O_RDONLY | _FLAGS)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            whole = file.read() if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_SIZE else b""
        return self._parsed(whole)

    def _parsed(self, whole: bytes) -> Any:
        self._end = 0
        for line in whole.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                return
            yield found
            self._end += len(line)

    def _afresh(self, why: str) -> bool:
        _logger.warning("output %r: starting afresh: %s", self._output, why)
        return False


def sample(read: Callable[[int, memoryview], None], nbytes: int) -> int:
    """A checksum of some bytes: of all where they are few, else of blocks spread evenly over them.

    Args:
        read: fills a buffer from an offset on.
        nbytes: how many there are.
    """
    found = 0
    if nbytes <= _BLOCK * _BLOCKS:
        starts, length = [0], nbytes
    else:
        starts, length = [(nbytes - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)], _BLOCK
    buffer = memoryview(bytearray(length))
    for start in starts:
        read(start, buffer)
        found = zlib.crc32(buffer, found)
    return found
