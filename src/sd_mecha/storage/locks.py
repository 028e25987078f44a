"""Temporary files that only one merge at a time may write.

An output has one temporary name, so that a run finds what an earlier one, which was killed, has left there. Who
writes such a file holds a lock on it, which the system releases when the process ends in whatever way. A temporary
file that nobody has locked is hence a leftover.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Callable

from sd_mecha.storage.capabilities import capabilities

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_logger = logging.getLogger("sd_mecha")

_NAME_SIZE = 120  # bytes of the final name that are kept: some file systems allow no more than 143 altogether
_FLAGS = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_EXISTING = _FLAGS | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # it may be anything
_HELD = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, getattr(errno, "EDEADLOCK", errno.EAGAIN))
_MOMENT = 0.05  # seconds
_LOCKED_BYTE = 1 << 62  # on Windows nobody else can read a byte that is locked: one far behind the data


class Held(OSError):
    """Another process, or another merge of this one, has the file locked."""


def part_name(name: str) -> str:
    """The name of the temporary file of an output; a long name is cut, and told from others by a hash.

    >>> part_name("model.safetensors")
    '.model.safetensors.part'
    """
    raw = os.fsencode(name)
    if len(raw) > _NAME_SIZE:
        name = f"{raw[: _NAME_SIZE - 17].decode('utf-8', 'ignore')}~{hashlib.sha256(raw).hexdigest()[:16]}"
    return f".{name}.part"


def claim(path: str, keep: Callable[[], bool] | None = None) -> tuple[int, bool]:
    """Create a temporary file and lock it.

    Args:
        path: its name. What is there already, and locked by nobody, is the leftover of a run that was killed.
        keep: asked, with the leftover locked, whether to go on in it; otherwise it is removed, and a file made that
            has the owner and the permissions of a new one.

    Returns:
        The descriptor, which holds the lock until it is closed, and whether the file is a leftover.

    Raises:
        Held: another merge is writing to it.
        OSError: the system refuses, or the name leads to something that no merge has made.
    """
    while True:
        try:
            descriptor, fresh = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            found = _open_leftover(path)
            if found is None:
                continue
            descriptor, fresh = found, False
        except KeyboardInterrupt:  # it may come when the file is there, and its descriptor is lost
            _remove_empty(path)
            raise
        try:
            locked = try_lock(descriptor)
            if not locked and fresh:  # perhaps by one that takes it for an empty leftover, and is about to remove it
                time.sleep(_MOMENT)
            current = leads_to(path, descriptor)
            if not locked and (current or not fresh):
                raise Held(errno.EWOULDBLOCK, "another merge is writing to it")
            if current and (fresh or (keep is not None and _is_own(descriptor) and keep())):
                return descriptor, not fresh
        except BaseException:
            os.close(descriptor)
            if fresh:
                _remove_empty(path)
            raise
        if current:
            remove(path, descriptor)
        else:  # the other merge has just ended: its file has another name by now, or none
            os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock a file until its descriptor is closed.

    Returns:
        Whether nobody else has it locked. True, too, where the system or the file system knows no locks.
    """
    if not capabilities.flock:
        return True
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        _logger.debug("going on without a lock: %s", error.strerror)
    return True


def leads_to(path: str, descriptor: int) -> bool:
    """Whether a path still leads to the file of a descriptor."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove(path: str, descriptor: int) -> None:
    """Remove a file and close its descriptor (-1: closed already); under its lock where an open one can be removed."""
    try:
        if capabilities.rename_open:
            _unlink(path)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if not capabilities.rename_open:
        _unlink(path)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_empty(path: str) -> None:
    """Remove a leftover in which there is nothing. One that another merge has just made, it makes again."""
    with contextlib.suppress(OSError):
        descriptor = _open_leftover(path)
        if descriptor is None:
            return
        if os.fstat(descriptor).st_size == 0 and try_lock(descriptor) and leads_to(path, descriptor):
            remove(path, descriptor)
        else:
            os.close(descriptor)


def _open_leftover(path: str) -> int | None:
    """A file that is there already; None if it is there no more."""
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):  # not to wait for the other end of a pipe
            descriptor = os.open(path, _EXISTING)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
    except FileNotFoundError:
        return None
    raise OSError(errno.EEXIST, f"its temporary name {path!r} leads to something else than a file; move that")


def _is_own(descriptor: int) -> bool:
    """Whether nobody else has put the file there, or has another name for it."""
    status = os.fstat(descriptor)
    return status.st_nlink == 1 and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())
