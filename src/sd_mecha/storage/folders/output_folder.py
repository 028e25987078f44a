"""A folder that is written beside its final name and appears under it only when it is complete.

Files go into `.NAME.part`, in the same parent folder. `publish` syncs all of it to the disk and gives it the final
name: by a rename, or where a folder of that name exists, by letting both change places, in one step where the system
can. What else lies in the old folder comes along; the old folder is removed only when the new one is in its place.

Journals of what is complete go into `.NAME.part.journals`, so that they are there until the folder has its name, and
not in it then.

The lock file, `.NAME.part.lock`, says which hidden folders beside the output are leftovers of a merge. It stays as long
as they do. A folder that happens to have such a name and is somebody's own is never removed. Before two folders change
places it also says which is which: what is left under the temporary name may be either.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import posixpath
import re
import stat
import sys
from collections.abc import Callable, Collection

from sd_mecha.errors import OutputError, OutputFolderError
from sd_mecha.storage import locks
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.contract import ByteSource
from sd_mecha.storage.disk import reporting, sync_folder
from sd_mecha.storage.folders.sharded import is_known_weights
from sd_mecha.storage.folders.trees import carry, keep_modes, like, remove_tree, sweep, sync_tree, walk

_COPY_SIZE = 8 << 20
_PART, _BOTH, _SWAP = b"part    ", b"part old", b"swap    "  # what a lock file says is a merge's
_MARKS = (_PART, _BOTH, _SWAP)
_SAID_SIZE = 28  # that, and the inode of the new folder; written in one go
_AT_CWD, _EXCHANGE = -100, 2  # of Linux' renameat2
_IS_MODEL = re.compile(
    r"config\.json|model_index\.json|.*\.index(\.[\w-]+)?\.json|adapter_config\.json"
    r"|(model|diffusion_pytorch_model|adapter_model)\b.*\.safetensors|pytorch_model.*\.bin"
)

_logger = logging.getLogger("sd_mecha")


class OutputFolder:
    """An output folder under construction. Nothing touches the disk before `create`.

    Args:
        path: the final name. A symbolic link is followed, so that the folder it leads to is the one replaced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._target = ""
        self.part = ""
        """Where the files go until they are published; empty before `create` and after the end."""
        self._temporary = self._journals = self._old = self._lock_path = ""
        self._lock = -1
        self._made = self._inode = b""  # what the lock file says

    def create(self, keep: Collection[str] = ()) -> None:
        """Lock the output and make the folder for its files.

        Args:
            keep: relative paths of what may stay of an earlier run that was interrupted, with its journals.

        Raises:
            OutputError: the parent folder does not exist or allows no new folder, another merge writes to this one,
                what stands there is neither empty nor the folder of a model, or a folder that no merge has made has
                the temporary name.
        """
        with reporting(self.path, "cannot be created"):
            self._target = os.path.realpath(self.path)
            self._check_target()
            self._claim()
        try:
            with reporting(self.path, "cannot be created"):
                self._recover()
                self._make_room(bool(keep))
                self._say(_PART)
                part = self._temporary
                os.makedirs(part, 0o700 if os.path.isdir(self._target) else 0o777, exist_ok=True)
                like(self._target, part, 0o700)
                for root in (self._journals, part) if keep else ():
                    kept = {os.path.join(root, *name.split("/")) for name in keep}
                    if sweep(root, kept) and root == self._journals:
                        self._say_afresh()
                    for path in kept:
                        os.makedirs(os.path.dirname(path), exist_ok=True)
                        like(path, path, 0o600)  # it may have those of the old file already
                    sync_tree(root)
                sync_folder(os.path.dirname(part))
                self.part = part
        except BaseException:
            self.discard()
            raise

    def make_way(self, resume: bool) -> None:
        """Remove what a merge has left that was killed, for one into a file of this name.

        Args:
            resume: whether that would have gone on with what is complete.

        Raises:
            OutputError: that merge is running, or a folder that no merge has made has the temporary name.
        """
        with reporting(self.path, "cannot be created"):
            self._target = os.path.realpath(self.path)
            self._claim()
            try:
                self._recover()
                kept = os.path.isdir(self._journals)
                self._make_room(resume=False)
                if resume and kept:
                    self._say_afresh()
            finally:
                self.release()

    def place(self, name: str) -> str:
        """The path of a file under construction, by its relative name; its folder is made."""
        path = os.path.join(self.part, *name.split("/"))
        with reporting(self.path, "cannot be created"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def protect(self, name: str) -> None:
        """Give a file, before anything is in it, the permissions of the one that it will replace."""
        parts = name.split("/")
        with reporting(self.path, "cannot be created"):
            like(os.path.join(self._target, *parts), os.path.join(self.part, *parts), 0o600)

    def journal(self, name: str) -> str:
        """Where to keep the journal of that file; it is removed with the folder, or when that has its name."""
        return os.path.join(self._journals, *name.split("/"))

    def put(self, name: str, content: bytes | ByteSource) -> None:
        """Write a small file, or copy one.

        Raises:
            OutputError: the disk refused.
        """
        path = self.place(name)
        with reporting(self.path, f"cannot hold {name!r}"), open(path, "wb") as file:
            self.protect(name)
            if isinstance(content, bytes):
                file.write(content)
            else:
                for start in range(0, content.size, _COPY_SIZE):
                    file.write(content.read(start, min(_COPY_SIZE, content.size - start)))
            file.flush()
            os.fsync(file.fileno())

    def publish(self, replaced: Callable[[str], bool]) -> None:
        """Make the folder durable and give it its final name, with what the old folder holds besides.

        Args:
            replaced: whether a file of the old folder, by its relative name, is not to come along.

        Raises:
            OutputError: the old folder is in its place as it was, and the new one still under construction.
        """
        with reporting(self.path, "cannot be completed"):
            exists = os.path.isdir(self._target)
            if exists:
                carry(self._target, self.part, replaced)
                keep_modes(self._target, self.part)
                os.chmod(self.part, stat.S_IMODE(os.stat(self._target).st_mode))
            sync_tree(self.part)
            new = os.lstat(self.part)
            try:
                if exists:
                    self._exchange()
                else:
                    os.rename(self.part, self._target)
            except BaseException as error:  # an interruption, or an answer lost on a network, may come after the fact
                if not _leads_to(self._target, new):
                    raise
                self._clean_up(replaced)
                if not isinstance(error, OSError):
                    raise
            else:
                self._clean_up(replaced)

    def discard(self) -> None:
        """Remove what was written. Harmless after publishing or a second time."""
        if self.part:
            for path in (self._journals, self.part):
                with contextlib.suppress(OSError):
                    remove_tree(path)
        self.release()

    def release(self) -> None:
        """Let go of the lock; what was written stays for the next run, and with it the file that says whose it is."""
        self.part = ""
        if self._lock >= 0:
            descriptor, self._lock = self._lock, -1
            ours = [self._temporary, self._journals] if self._made in _MARKS else []
            if self._made == _BOTH:
                ours.append(self._old)
            with contextlib.suppress(OSError):
                if any(map(os.path.lexists, ours)):
                    os.close(descriptor)
                else:
                    locks.remove(self._lock_path, descriptor)

    def _check_target(self) -> None:
        folder = os.path.dirname(self._target)
        if not os.path.isdir(folder):
            raise OutputFolderError(f"output {self.path!r}: there is no folder {folder!r}; create it or choose another")
        if not os.path.lexists(self._target):
            return
        if not os.path.isdir(self._target):
            raise OutputError(f"output {self.path!r} is a file, and the output a folder; choose another name")
        found = os.listdir(self._target)
        if found and not any(_IS_MODEL.fullmatch(name) for name in found):
            raise OutputError(
                f"output {self.path!r} is a folder that holds something else than a model, such as {min(found)!r}; "
                "name a file in it, or a folder that is new, empty, or that of a model to be replaced"
            )
        for _ in walk(self._target):  # what cannot be listed could not come along
            pass

    def _claim(self) -> None:
        """Find the temporary names, lock them, and read what the lock file says."""
        folder, name = os.path.split(self._target)
        self._temporary = part = os.path.join(folder, locks.part_name(name))
        self._journals = f"{part}.journals"
        self._old = part.removesuffix(".part") + ".old"
        self._lock_path = f"{part}.lock"
        descriptor, _ = locks.claim(self._lock_path, lambda: True)
        try:
            said = os.read(descriptor, _SAID_SIZE)
            self._made, self._inode = said[: len(_PART)], said[len(_PART) :]
            if said and self._made not in _MARKS:
                raise OutputError(
                    f"output {self.path!r}: {self._lock_path!r}, where its lock file goes, holds something that no "
                    "merge writes there; move that, or choose another name"
                )
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor

    def _recover(self) -> None:
        """Put back, or remove, the old folder that a run left which was killed while it published.

        What has appeared in it at the last moment comes along.
        """
        old = {_SWAP: self._temporary, _BOTH: self._old}.get(self._made, "")
        if not os.path.lexists(old) or (self._made == _SWAP and _inode(old) == self._inode):
            return
        if os.path.isdir(self._target):
            carry(old, self._target, lambda path: is_known_weights(posixpath.basename(path)))
            sync_tree(self._target)
            remove_tree(old)
        elif not os.path.lexists(self._target):
            os.rename(old, self._target)

    def _make_room(self, resume: bool) -> None:
        """Remove what an earlier run left under the temporary names, but for folders that this one goes on in."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISREG(os.lstat(self._temporary).st_mode):  # of a merge into a file of this name, perhaps running
                descriptor, _ = locks.claim(self._temporary)
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._temporary}.journal")
                    if resume:
                        self._say_afresh()
                locks.remove(self._temporary, descriptor)
        for path in (self._journals, self._temporary):  # a journal must not outlive what it is about
            if not os.path.lexists(path):
                continue
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            if not is_folder or (self._made not in _MARKS and os.listdir(path)):
                raise OutputError(
                    f"output {self.path!r}: its temporary name {path!r} leads to something that no merge is "
                    "known to have made; move that, or choose another name"
                )
            if resume:
                like(path, path, 0o700)  # it may have those of the old folder already
            else:
                remove_tree(path)

    def _say_afresh(self) -> None:
        _logger.warning("output %r: starting afresh: the recipe, an input or an option changed", self.path)

    def _say(self, made: bytes, inode: bytes = b"") -> None:
        """Put into the lock file which of the hidden folders are this merge's, before they are made."""
        os.lseek(self._lock, 0, os.SEEK_SET)
        os.write(self._lock, (made + inode).ljust(_SAID_SIZE))
        os.fsync(self._lock)
        self._made, self._inode = made, inode

    def _exchange(self) -> None:
        """Put the new folder in the place of the old one; the lock file says where that is afterwards."""
        if capabilities.exchange:
            self._say(_SWAP, _inode(self.part))
            sync_folder(os.path.dirname(self._target))
            if _exchange(self.part, self._target):
                return
        if os.path.lexists(self._old):
            raise OutputError(
                f"output {self.path!r} cannot be completed: {self._old!r} is in the way; move or remove that"
            )
        self._say(_BOTH)
        sync_folder(os.path.dirname(self._target))
        try:
            os.rename(self._target, self._old)
            os.rename(self.part, self._target)
        except BaseException:  # an interruption comes after a rename as well as before it
            if os.path.lexists(self._old) and not os.path.lexists(self._target):
                os.rename(self._old, self._target)
            if not os.path.lexists(self._old):
                self._say(_PART)
            raise

    def _clean_up(self, replaced: Callable[[str], bool]) -> None:
        """The new folder has its name: take along what has appeared in the old one meanwhile, and remove that."""
        part, self.part = self.part, ""
        sync_folder(os.path.dirname(self._target))
        with contextlib.suppress(OSError):
            remove_tree(self._journals)
        old = {_SWAP: part, _BOTH: self._old}.get(self._made, "")
        try:
            if old:
                carry(old, self._target, replaced)
                sync_tree(self._target)
        except OSError as error:
            self._made = b""  # without its lock file, no later run removes it
            _logger.warning(
                "not all that came into the old folder %r at the last moment could be taken along: %s; "
                "move what you need, and remove it",
                old,
                error.strerror or error,
            )
        else:
            try:
                if old:
                    remove_tree(old)
            except OSError as error:
                _logger.warning("the old folder %r could not be removed: %s; remove it", old, error.strerror)
        self.release()


def _leads_to(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(path), status)
    except OSError:
        return False


def _inode(path: str) -> bytes:
    return b"%20d" % os.lstat(path).st_ino


def _exchange(one: str, other: str) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), other)
