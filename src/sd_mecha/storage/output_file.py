"""A file that is written beside its final name and appears under it only when it is complete.

The bytes go to a hidden temporary file in the same folder, `.NAME.part`. `publish` syncs it to the disk and renames
it, so that the final name leads to the old file or to the whole new one, whatever happens in between. The disk space
is reserved first: a full disk is reported before the work, not after. While the work goes on, what is written
is sent to the disk now and then, so that the sync at the end has little left to wait for.

The temporary file is locked: a second merge to the same output is refused, and what a killed one has left is removed
by the next, or continued (see `journal`).

In a folder that is hidden itself until it is complete, a file has its name from the beginning.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable

from sd_mecha.errors import OutputError, OutputFolderError
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.disk import refusal, reporting, sync_folder
from sd_mecha.storage.folders.output_folder import OutputFolder
from sd_mecha.storage.locks import claim, leads_to, part_name, remove

_COPY_SIZE = 8 << 20
_FLUSH_SIZE = 64 << 20
_FLUSH_SECONDS = 10.0  # where somebody wants to know what is durable


class OutputFile:
    """An output under construction.

    Nothing touches the disk before `create`. All threads must have left `write_at` when `publish` or
    `discard` runs.

    Args:
        path: the final name. A symbolic link is followed, so that the file it leads to is the one replaced.
        journal: of a file in a folder under construction, where its journal goes; whoever publishes the folder removes
            that. None: the folder is somebody's, so file and journal have hidden names in it.

    Attributes:
        on_flush: called before what is written is made durable; what it returns is called after that. Both may run
            in another thread.
    """

    def __init__(self, path: str | os.PathLike[str], journal: str | None = None) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._journal = journal
        self.on_flush: Callable[[], Callable[[], object]] | None = None
        self._target = ""
        self._mode: int | None = None  # of the file that is replaced
        self._descriptor = -1
        self._claimed = False  # whether the temporary file is there and this output's own
        self._unflushed = 0  # bytes, roughly: threads count without a lock
        self._flushed_at = 0.0
        self._flushing = threading.Lock()  # held while a flush runs, and to close the descriptor
        self._flush_error: OSError | None = None
        self._lock = threading.Lock()  # guards the file position where positional calls are missing

    def locate(self) -> None:
        """Find out where the file will be, and that it may be there. `create` does so, too.

        Raises:
            OutputError: the folder does not exist, or the final name leads to something that is not a file.
        """
        with reporting(self.path, "cannot be created"):
            target = os.path.realpath(self.path) if self._journal is None else self.path
        self._check_target(target)
        self._target = target

    @property
    def temporary(self) -> str:
        """The temporary file; valid once it is known where the file will be."""
        if self._journal is not None:
            return self._target
        folder, name = os.path.split(self._target)
        return os.path.join(folder, part_name(name))

    @property
    def journal(self) -> str:
        """Where to keep a journal of what is complete; it is removed when the temporary file is, or gets its name."""
        return self.temporary + ".journal" if self._journal is None else self._journal

    def create(self, size: int, keep: Callable[[], bool] | None = None) -> bool:
        """Create the temporary file, lock it and reserve its space.

        Args:
            size: bytes.
            keep: asked whether to go on in what a killed run has left, if there is something; else that is removed.

        Returns:
            Whether the temporary file is such a leftover.

        Raises:
            OutputError: the folder does not exist or allows no new file, the disk is too full, another merge is
                writing to the same output, or the final name leads to something that is not a file. Nothing is left
                behind but what was there.
        """
        self.locate()
        if os.path.isdir(self.temporary):  # of a merge into a folder of this name
            OutputFolder(self.path).make_way(resume=keep is not None)
            self.locate()  # that may have put the old folder back
        kept = False

        def goes_on() -> bool:  # a new file stays empty until the journal of the one before is gone for good
            return keep is not None and os.lstat(self.temporary).st_size > 0 and keep()

        try:
            with reporting(self.path, "cannot be created"):
                self._descriptor, kept = claim(self.temporary, goes_on)
                self._claimed, self._flushed_at = True, time.monotonic()
                if not kept:
                    self._remove_journal()
                    self.sync_folder()
            with reporting(self.path, f"has no room for {size} bytes"):
                if self._journal is None:
                    with contextlib.suppress(FileNotFoundError, PermissionError):
                        self._mode = stat.S_IMODE(os.stat(self._target).st_mode)
                        os.chmod(self.temporary, self._mode | 0o600)  # a private file stays private
                self._reserve(size)
            return kept
        except BaseException:
            (self.release if kept else self.discard)()
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
            raise refusal(self.path, "cannot be written", error) from error
        self._unflushed += len(view)
        if self._unflushed >= _FLUSH_SIZE and (capabilities.fdatasync or self.on_flush is not None):
            self._start_flush()

    def flush_if_due(self) -> None:
        """Make what is written durable beside the work, if that was not done for a while."""
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self._start_flush()

    def read_at(self, offset: int, view: memoryview) -> None:
        """Fill a flat view with bytes that were written; several threads may do so at once."""
        with reporting(self.path, "cannot be read back"):
            if capabilities.preadv:
                while view:
                    count = _progress(os.preadv(self._descriptor, [view], offset))
                    view, offset = view[count:], offset + count
                return
            with self._lock:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                while view:
                    data = os.read(self._descriptor, len(view))
                    view[: len(data)] = data
                    view = view[_progress(len(data)) :]

    def move_down(self, source: int, destination: int, length: int) -> None:
        """Copy bytes to a lower place in the file; the ranges may overlap."""
        buffer = memoryview(bytearray(min(length, _COPY_SIZE)))
        done = 0
        while done < length:
            part = buffer[: length - done]
            self.read_at(source + done, part)
            self.write_at(destination + done, part)
            done += len(part)

    def publish(self, size: int) -> None:
        """Cut the file to its size, make it durable and give it its final name; in a hidden folder, it has that.

        Raises:
            OutputError: the file under the final name is untouched and the temporary one still there.
        """
        with reporting(self.path, "cannot be completed"):
            os.ftruncate(self._descriptor, size)
            with self._flushing:
                self._sync()
            if self._mode is not None and hasattr(os, "fchmod"):
                with contextlib.suppress(PermissionError):
                    os.fchmod(self._descriptor, self._mode)
            if not leads_to(self.temporary, self._descriptor):
                raise FileNotFoundError(errno.ENOENT, f"its temporary file {self.temporary!r} was removed or replaced")
            if self._journal is None:
                if not capabilities.rename_open:
                    self._close()
                os.replace(self.temporary, self._target)
        self._claimed = False
        with contextlib.suppress(OSError):  # everything is on the disk
            self._close()
        if self._journal is None:
            self.sync_folder()  # before the journal goes: should the new name not last, the old one is gone on with
            with contextlib.suppress(OSError):
                self._remove_journal()

    def discard(self) -> None:
        """Remove the temporary file and its journal, if there are any of this output."""
        if not self._claimed:
            return
        self._claimed = False
        descriptor = self._take_descriptor()
        ours = False
        with contextlib.suppress(OSError):
            ours = descriptor < 0 or leads_to(self.temporary, descriptor)
        if ours:
            with contextlib.suppress(OSError):
                self._remove_journal()
            with contextlib.suppress(OSError):
                remove(self.temporary, descriptor)
        elif descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def sync(self) -> None:
        """Make what is written durable now.

        Raises:
            OutputError: the disk refuses, or did so earlier.
        """
        with reporting(self.path, "cannot be completed"), self._flushing:
            self._unflushed = 0
            after = self._mark()
            self._sync()
            after()

    def release(self) -> None:
        """Let go of the temporary file, and leave it and its journal to a later run."""
        self._claimed = False
        with contextlib.suppress(OSError):
            self._close()

    def _check_target(self, target: str) -> None:
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise OutputFolderError(f"output {self.path!r}: there is no folder {folder!r}; create it or choose another")
        if os.path.isdir(target):
            raise OutputError(f"output {self.path!r} is a folder; name a file in it")
        if os.path.exists(target) and not os.path.isfile(target):
            raise OutputError(f"output {self.path!r} is not a regular file; choose another name")

    def _reserve(self, size: int) -> None:
        if capabilities.fallocate and size:
            try:
                os.posix_fallocate(self._descriptor, 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                    raise
        # Without a reservation the free space is the best forecast; a full disk can still come later.
        if shutil.disk_usage(os.path.dirname(self._target)).free < size:
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

    def _start_flush(self) -> None:
        if self._flushing.locked():
            return  # one at a time
        self._unflushed, self._flushed_at = 0, time.monotonic()
        begun = threading.Event()
        with contextlib.suppress(RuntimeError):  # no more threads: only the final sync takes longer
            threading.Thread(target=self._flush, args=(begun,), name="sd-mecha-flush", daemon=True).start()
            begun.wait()

    def _flush(self, begun: threading.Event) -> None:
        """Run in a thread of its own, which takes the lock itself: ctrl-C cannot get between that and letting go."""
        taken = self._flushing.acquire(blocking=False)
        begun.set()
        if not taken:
            return
        try:
            if self._descriptor < 0:
                return
            after = self._mark()
            if capabilities.fdatasync:
                os.fdatasync(self._descriptor)
            else:
                os.fsync(self._descriptor)
            after()
        except OSError as error:
            self._flush_error = error
        finally:
            self._flushing.release()

    def _mark(self) -> Callable[[], object]:
        on_flush = self.on_flush
        return (lambda: None) if on_flush is None else on_flush()

    def _sync(self) -> None:
        if self._flush_error is not None:  # the system reports a failed write-back once: another sync would succeed
            raise self._flush_error
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._flush_error = error
            raise

    def _take_descriptor(self) -> int:
        with self._flushing:  # a flush must not meet a descriptor that belongs to another file by then
            descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def _close(self) -> None:
        descriptor = self._take_descriptor()
        if descriptor >= 0:
            os.close(descriptor)

    def _remove_journal(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.journal)

    def sync_folder(self) -> None:
        """Make the names of the file and of its journal durable."""
        for folder in {os.path.dirname(self._target), os.path.dirname(self.journal)}:
            sync_folder(folder)


def _progress(count: int) -> int:
    """A call that moves nothing and reports nothing would be repeated for ever."""
    if not count:
        raise OSError(errno.EIO, "no progress")
    return count
