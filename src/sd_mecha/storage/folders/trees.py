"""What an output does with whole folders: nothing in them is passed over because it could not be listed."""

from __future__ import annotations

import os
import shutil
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


def sweep(folder: str, keep: Collection[str]) -> None:
    """Remove all files but some, and all links."""
    for inside, folders, files in walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(inside, name))]
        for name in [*files, *links]:
            if (path := os.path.join(inside, name)) not in keep or os.path.islink(path):
                os.unlink(path)


def remove_tree(path: str) -> None:
    """Remove a folder with all that is in it, or what else has the name."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
