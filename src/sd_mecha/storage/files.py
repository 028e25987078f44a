"""Reading ranges of files from several threads, with a bounded number of open descriptors.

A merge may name hundreds of models, and every worker reads all of them. Files therefore do not own
descriptors: they borrow one from a pool that keeps the most recently used ones open and closes the others,
and open again later. An input that was replaced or changed meanwhile is noticed then, because its identity no
longer fits.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections import OrderedDict
from typing import NamedTuple

from sd_mecha.errors import ChangedInputError, MechaError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.contract import flat_bytes


class Identity(NamedTuple):
    """What tells whether a path still leads to the same, unchanged file."""

    size: int
    mtime_ns: int
    inode: int


class _Handle:
    """An open descriptor and the number of reads that are using it now."""

    __slots__ = ("file", "lock", "retired", "users")

    def __init__(self, file: io.FileIO) -> None:
        self.file = file
        self.lock = threading.Lock()  # guards the file position where positional reads are missing
        self.retired = False
        self.users = 0


def descriptor_limit() -> int:
    """Half of what the process may have open, so that the program around it keeps the other half."""
    try:
        import resource
    except ImportError:  # Windows has no such limit to ask for
        return 256
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if allowed == resource.RLIM_INFINITY else max(min(allowed // 2, 1024), 8)


class DescriptorPool:
    """Keeps at most `limit` descriptors open, more only while more than that are in use at once.

    Reading all models in turn with fewer descriptors than models would open a file for every read.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = descriptor_limit() if limit is None else limit
        self._handles: OrderedDict[object, _Handle] = OrderedDict()
        # Re-entrant: a RangeFile may be garbage-collected, hence forgotten, while this thread holds the lock.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._handles)

    def borrow(self, file: RangeFile) -> _Handle:
        """A handle that stays open until it is given back."""
        with self._lock:
            handle = self._handles.get(file.token)
            if handle is None:
                handle = self._handles[file.token] = _Handle(self._open(file))
            else:
                self._handles.move_to_end(file.token)
            handle.users += 1
            if len(self._handles) > self.limit:
                self._shrink()
            return handle

    def give_back(self, handle: _Handle) -> None:
        """End of one use."""
        with self._lock:
            handle.users -= 1
            if handle.retired and not handle.users:
                handle.file.close()

    def forget(self, token: object) -> None:
        """Close the descriptor of that file, at once or at the end of the reads that still use it."""
        with self._lock:
            handle = self._handles.pop(token, None)
            if handle is None:
                return
            handle.retired = True
            if not handle.users:
                handle.file.close()

    def _open(self, file: RangeFile) -> io.FileIO:
        """Open a file; where the system allows no more descriptors, keep fewer from now on and try again."""
        while True:
            try:
                return file.open_descriptor()
            except OSError as error:
                before = len(self._handles)
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not before:
                    raise
                self.limit = min(self.limit, before * 3 // 4)  # the output needs some, too
                self._shrink()
                if len(self._handles) == before:  # all are in use
                    raise

    def _shrink(self) -> None:
        for token, handle in list(self._handles.items()):
            if len(self._handles) <= self.limit:
                return
            if not handle.users:
                self.forget(token)


POOL = DescriptorPool()


class RangeFile:
    """A regular file that is read by range.

    Args:
        path: where the file is.
        requested: what the user asked for, where that was another text; shown when nothing is found.
        pool: where descriptors come from.

    Raises:
        ModelNotFoundError: the path leads nowhere.
        ModelAccessError: what it leads to is no regular file, or may not be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, requested: str | None = None, pool: DescriptorPool = POOL
    ) -> None:
        self.token = object()  # stands for this file in the pool, which must not keep the file itself alive
        self.closed = True
        self.path = os.path.abspath(os.fspath(path))
        self._requested = os.fspath(path) if requested is None else requested
        self._pool = pool
        self._opened: Identity | None = None
        try:
            status = os.stat(self.path)
            self._check_kind(status)
            self._opened = _identity(status)
            self.closed = False
            pool.give_back(pool.borrow(self))  # permission is known only by opening
        except (OSError, ValueError) as error:
            if isinstance(error, MechaError):
                raise
            raise self._cannot_open(error) from error

    @property
    def name(self) -> str:
        """What messages call the file."""
        return self.path

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        assert self._opened is not None
        return self._opened.size

    @property
    def fingerprint(self) -> str:
        """Path, size, modification time and inode when it was opened."""
        assert self._opened is not None
        return " ".join([self.path, *map(str, self._opened)])

    def identity(self) -> Identity:
        """Size, modification time and inode that the path has now.

        Raises:
            ChangedInputError: the file has vanished.
        """
        try:
            return _identity(os.stat(self.path))
        except OSError as error:
            raise ChangedInputError(f"{self.path}: vanished while it was in use: {error.strerror}") from error

    def check_unchanged(self) -> None:
        """Compare with the state when it was opened.

        Raises:
            ChangedInputError: the file was replaced, resized, touched or removed since.
        """
        self._compare(self.identity())

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from that offset on; safe from several threads.

        Raises:
            ChangedInputError: the file ends before the range does, was replaced, or cannot be read.
        """
        view = flat_bytes(buffer)
        handle = self._borrow()
        try:
            if capabilities.preadv:
                done = _read_at(handle.file.fileno(), offset, view)
            else:
                with handle.lock:
                    done = _seek_and_read(handle.file, offset, view)
        except OSError as error:
            raise ChangedInputError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from error
        finally:
            self._pool.give_back(handle)
        if done < len(view):
            raise ChangedInputError(
                f"{self.path}: ends at byte {offset + done}, expected {len(view) - done} more; "
                "the file was shortened while it was being read"
            )

    def read(self, offset: int, length: int) -> bytes:
        """Those bytes as a new object; for small things such as headers."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Close the descriptor; the file may be replaced or removed afterwards, on Windows too."""
        self.closed = True
        self._pool.forget(self.token)

    def __del__(self) -> None:
        if not self.closed:
            self.close()

    def open_descriptor(self) -> io.FileIO:
        """Open the path, provided that it still leads to the file first seen. The pool calls it."""
        if self.closed:
            raise ValueError(f"{self.path}: read after close()")
        file = io.FileIO(self.path, "r")
        try:
            self._compare(_identity(os.fstat(file.fileno())))
        except BaseException:
            file.close()
            raise
        return file

    def _borrow(self) -> _Handle:
        try:
            return self._pool.borrow(self)
        except ChangedInputError:
            raise
        except OSError as error:
            raise ChangedInputError(f"{self.path}: cannot be opened again: {error.strerror}") from error

    def _compare(self, now: Identity) -> None:
        if now == self._opened:
            return
        assert self._opened is not None
        changes = ", ".join(
            f"{field} was {then}, is {value}"
            for field, then, value in zip(Identity._fields, self._opened, now, strict=True)
            if then != value
        )
        raise ChangedInputError(f"{self.path}: changed while it was in use ({changes}); merge again")

    def _check_kind(self, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            return
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ModelAccessError(f"{self._where()} is {what}; name a model file")

    def _where(self) -> str:
        resolved = "" if self._requested == self.path else f" (resolved to {self.path!r})"
        return f"model {self._requested!r}{resolved}"

    def _cannot_open(self, error: OSError | ValueError) -> MechaError:
        if isinstance(error, FileNotFoundError):
            folder = os.path.dirname(self.path)
            if not os.path.isdir(folder):
                return ModelNotFoundError(f"{self._where()} was not found: there is no folder {folder!r}")
            return ModelNotFoundError(f"{self._where()} was not found; check the name and the model folders")
        if isinstance(error, NotADirectoryError | ValueError):  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else error
            return ModelNotFoundError(f"{self._where()} cannot be opened: {reason}; check the path")
        step = "check its permissions" if isinstance(error, PermissionError) else "check the disk"
        return ModelAccessError(f"{self._where()} cannot be opened: {error.strerror or error}; {step}")


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_size, status.st_mtime_ns, status.st_ino)


def _read_at(descriptor: int, offset: int, view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:] if done else view], offset + done)
        if not count:
            break
        done += count
    return done


def _seek_and_read(file: io.FileIO, offset: int, view: memoryview) -> int:
    file.seek(offset)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done
