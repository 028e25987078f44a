"""What an output does with whole folders: nothing in them is passed over because it could not be listed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator

from sd_mecha.storage.disk import sync_folder


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """All folders and files; a folder that cannot be listed is an error, and one that has gone holds nothing."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise OSError(error.errno, f"{error.filename!r} cannot be listed: {error.strerror}") from error

    return os.walk(folder, onerror=refuse)


def sync_tree(folder: str) -> None:
    """Make the names in a folder and all below it durable."""
    for inside, _, _ in walk(folder):
        sync_folder(inside)


def carry(source: str, target: str, replaced: Callable[[str], bool]) -> None:
    """Give the new folder what the old one holds besides, without copying where files can have two names."""
    for folder, folders, files in walk(source):
        inside = os.path.relpath(folder, source)
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*files, *links]:
            relative = name if inside == "." else f"{inside.replace(os.sep, '/')}/{name}"
            there = os.path.join(target, inside, name)
            if replaced(relative) or os.path.lexists(there):
                continue
            os.makedirs(os.path.dirname(there), exist_ok=True)
            _link(os.path.join(folder, name), there)
        if not files and not folders:
            os.makedirs(os.path.join(target, inside), exist_ok=True)


def _link(source: str, target: str) -> None:
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or a file of somebody else
        shutil.copy2(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def like(old: str, new: str, also: int = 0) -> None:
    """Give a file or a folder the permissions of one that it replaces, if there is such a one, and more."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        mode = os.lstat(old).st_mode
        if not stat.S_ISLNK(mode) and stat.S_IFMT(mode) == stat.S_IFMT(os.lstat(new).st_mode):
            os.chmod(new, stat.S_IMODE(mode) | also)


def keep_modes(source: str, target: str) -> None:
    """Give all that is in a folder the permissions of what it replaces; folders stay open to their owner."""
    for inside, folders, files in walk(source):
        there = os.path.join(target, os.path.relpath(inside, source))
        for name in files:
            like(os.path.join(inside, name), os.path.join(there, name))
        for name in folders:
            like(os.path.join(inside, name), os.path.join(there, name), 0o700)


def sweep(folder: str, keep: Collection[str]) -> bool:
    """Remove all files but some, and all links; whether there were any."""
    swept = False
    for inside, folders, files in walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(inside, name))]
        for name in [*files, *links]:
            if (path := os.path.join(inside, name)) not in keep or os.path.islink(path):
                os.unlink(path)
                swept = True
    return swept


def remove_tree(path: str) -> None:
    """Remove a folder with all that is in it, also where it forbids that, or what else has the name."""
    if os.path.isdir(path) and not os.path.islink(path):
        with contextlib.suppress(OSError):  # perhaps it can be removed all the same
            like(path, path, 0o700)
            for inside, folders, _ in walk(path):
                for name in folders:
                    like(os.path.join(inside, name), os.path.join(inside, name), 0o700)
        shutil.rmtree(path)
    else:
        os.unlink(path)
