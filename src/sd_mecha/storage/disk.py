"""What files and folders under construction have in common: errors that say what to do, and names that last."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from sd_mecha.errors import OutputError
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.locks import Held

NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
"""What the system says of a disk, or of a user's share of it, that is full."""


@contextlib.contextmanager
def reporting(output: str, what: str) -> Iterator[None]:
    """Turn what the system refuses into an error of this library: which output, what cannot be done, and why."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise refusal(output, what, error) from error


def refusal(output: str, what: str, error: OSError | ValueError) -> OutputError:
    """The error that `reporting` raises."""
    code = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror or error) if isinstance(error, OSError) else error
    reported = OutputError(f"output {output!r} {what}: {reason}; {_next_step(error, code)}")
    reported.errno = code
    return reported


def _next_step(error: OSError | ValueError, code: int | None) -> str:
    if isinstance(error, Held):
        return "wait for it, or choose another name"
    if code in NO_ROOM:
        return "free some space or choose another folder"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check the permissions, close programs that use it, or choose another folder"
    if code == errno.EFBIG:
        return "this file system or account does not allow files of that size; choose another folder"
    if code in (errno.EBUSY, errno.EXDEV):
        return "a disk may be mounted there: choose another name, or a folder on it"
    return "check the disk, or choose another folder"


def sync_folder(folder: str) -> None:
    """Make the names in a folder durable; what its files hold already is, so failing to is no failure."""
    if not capabilities.fsync_directory:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
