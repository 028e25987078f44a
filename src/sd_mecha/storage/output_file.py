"""A file that is written beside its final name and appears under it only when it is complete.

The bytes go to a hidden temporary file in the same folder. `publish` syncs it to the disk and renames it, so
that the final name leads to the old file or to the whole new one, whatever happens in between. The disk space
is reserved first: a full disk is reported before the work, not after. While the work goes on, what is written
is sent to the disk now and then, so that the sync at the end has little left to wait for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator

from sd_mecha.errors import OutputError, OutputFolderError
from sd_mecha.storage.capabilities import capabilities

_COPY_SIZE = 8 << 20
_FLUSH_SIZE = 64 << 20


class OutputFile:
    """An output under construction.

    Nothing touches the disk before `create`. All threads must have left `write_at` when `publish` or
    `discard` runs.

    Args:
        path: the final name. A symbolic link is followed, so that the file it leads to is the one replaced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._temporary: str | None = None
        self._descriptor = -1
        self._unflushed = 0  # bytes, roughly: threads count without a lock
        self._flushing = threading.Lock()  # held while a flush runs, and to close the descriptor
        self._flush_error: OSError | None = None
        self._lock = threading.Lock()  # guards the file position where positional writes are missing

    def create(self, size: int) -> None:
        """Create the temporary file and reserve its space.

        Raises:
            OutputError: the folder does not exist or allows no new file, the disk is too full, or the final
                name leads to something that is not a file. Nothing is left behind.
        """
        with self._reporting("cannot be created"):
            target = os.path.realpath(self.path)
        self._check_target(target)
        folder, name = os.path.split(target)
        temporary = os.path.join(folder, f".{name[:40]}.{secrets.token_hex(8)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self._temporary, self._target = temporary, target
        try:
            with self._reporting("cannot be created"):
                self._descriptor = os.open(temporary, flags, 0o666)
            with self._reporting(f"has no room for {size} bytes"):
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))  # a private file stays private
                self._reserve(size, folder)
        except BaseException:
            self.discard()
            raise

    def write_at(self, offset: int, view: memoryview) -> None:
        """Write all bytes of a flat view; several threads may write different places at once."""
        try:
            if capabilities.pwrite:
                self._pwrite(offset, view)
            else:
                with self._lock:
                    self._seek_and_write(offset, view)
        except OSError as error:
            raise self._error("cannot be written", error) from error
        self._unflushed += len(view)
        if self._unflushed >= _FLUSH_SIZE and capabilities.fdatasync:
            self._start_flush()

    def move_down(self, source: int, destination: int, length: int) -> None:
        """Copy bytes to a lower place in the file; the ranges may overlap."""
        buffer = memoryview(bytearray(min(length, _COPY_SIZE)))
        done = 0
        while done < length:
            part = buffer[: length - done]
            self._read_at(source + done, part)
            self.write_at(destination + done, part)
            done += len(part)

    def publish(self, size: int) -> None:
        """Cut the file to its size, make it durable and give it its final name.

        Raises:
            OutputError: the file under the final name is untouched and the temporary one still there.
        """
        assert self._temporary is not None
        with self._reporting("cannot be completed"):
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
            self._close()
            if self._flush_error is not None:  # the system reports a failed write-back once: not to fsync again
                raise self._flush_error
            os.replace(self._temporary, self._target)
        self._temporary = None
        self._sync_folder()

    def discard(self) -> None:
        """Remove the temporary file, if there is one."""
        with contextlib.suppress(OSError):
            self._close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None

    def _check_target(self, target: str) -> None:
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise OutputFolderError(f"output {self.path!r}: there is no folder {folder!r}; create it or choose another")
        if os.path.isdir(target):
            raise OutputError(f"output {self.path!r} is a folder; name a file in it")
        if os.path.exists(target) and not os.path.isfile(target):
            raise OutputError(f"output {self.path!r} is not a regular file; choose another name")

    def _reserve(self, size: int, folder: str) -> None:
        if capabilities.fallocate and size:
            try:
                os.posix_fallocate(self._descriptor, 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                    raise
        # Without a reservation the free space is the best forecast; a full disk can still come later.
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(self._descriptor, size)

    def _pwrite(self, offset: int, view: memoryview) -> None:
        count = os.pwrite(self._descriptor, view, offset)
        while count < len(view):
            view, offset = view[count:], offset + count
            count = _progress(os.pwrite(self._descriptor, view, offset))

    def _seek_and_write(self, offset: int, view: memoryview) -> None:
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        while view:
            view = view[_progress(os.write(self._descriptor, view)) :]

    def _read_at(self, offset: int, view: memoryview) -> None:
        with self._reporting("cannot be read back"), self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            while view:
                data = os.read(self._descriptor, len(view))
                view[: len(data)] = data
                view = view[_progress(len(data)) :]

    def _start_flush(self) -> None:
        if not self._flushing.acquire(blocking=False):
            return  # one at a time
        self._unflushed = 0
        try:
            threading.Thread(target=self._flush, name="sd-mecha-flush", daemon=True).start()
        except RuntimeError:  # no more threads: only the final sync takes longer
            self._flushing.release()

    def _flush(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._flush_error = error
        finally:
            self._flushing.release()

    def _close(self) -> None:
        with self._flushing:  # a flush must not meet a descriptor that belongs to another file by then
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _sync_folder(self) -> None:
        """Make the new name durable; the file itself already is, so a folder that cannot be synced is no
        failure."""
        if not capabilities.fsync_directory:
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(os.path.dirname(self._target), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise self._error(what, error) from error

    def _error(self, what: str, error: OSError | ValueError) -> OutputError:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            step = "free some space or choose another folder"
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            step = "check the permissions, close programs that use the file, or choose another folder"
        elif code == errno.EFBIG:
            step = "this file system or account does not allow files of that size; choose another folder"
        else:
            step = "check the disk, or choose another folder"
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        reported = OutputError(f"output {self.path!r} {what}: {reason}; {step}")
        reported.errno = code
        return reported


def _progress(count: int) -> int:
    """A call that moves nothing and reports nothing would be repeated for ever."""
    if not count:
        raise OSError(errno.EIO, "no progress")
    return count
