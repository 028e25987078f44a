"""Directories in which relative model paths are looked up."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from sd_mecha.errors import ModelNotFoundError
from sd_mecha.storage import locations
from sd_mecha.storage.links import broken_link
from sd_mecha.storage.locations import Location, ask

_lock = threading.Lock()
_dirs: list[Path] = []

AnyPath = str | os.PathLike[str]


def add_path(path: AnyPath) -> None:
    """Add a directory, searched after those added before; adding one again changes nothing."""
    directory = Path(os.path.abspath(os.path.expanduser(path)))
    with _lock:
        if directory not in _dirs:
            _dirs.append(directory)


def remove_path(path: AnyPath) -> None:
    """Take a directory out again; one that was never added is ignored."""
    directory = Path(os.path.abspath(os.path.expanduser(path)))
    with _lock:
        if directory in _dirs:
            _dirs.remove(directory)


def get_all() -> list[Path]:
    """Return the directories in the order in which they are searched."""
    with _lock:
        return list(_dirs)


def normalize_path(path: AnyPath) -> Path:
    """Return where an input path leads.

    A relative path is looked up in the model directories in order, then in the working directory. One that
    exists nowhere is returned as an absolute path into the first place searched.
    """
    places = _places(path)
    return next((place for place in places if ask(Path.exists, place, place)), places[0])


def resolve_input(path: AnyPath) -> Path:
    """Return the existing file or directory that an input path leads to.

    Raises:
        ModelNotFoundError: it exists nowhere; the message lists the places searched, or names a link that leads
            nowhere.
    """
    found = normalize_path(path)
    if found.exists():
        return found
    if link := next(filter(None, map(broken_link, _places(path))), None):
        raise ModelNotFoundError(f"model {os.fspath(path)!r} cannot be read: {link}; mend it, or correct the path")
    if Path(_expanded(path)).is_absolute():
        raise ModelNotFoundError(f"model {str(found)!r} does not exist; check the path")
    searched = "".join(f"\n  {directory}" for directory in _search_path())
    raise ModelNotFoundError(
        f"model {os.fspath(path)!r} does not exist in any of these directories; correct the path, or add the "
        "directory that holds it (--models-dir on the command line, sd_mecha.extensions.model_dirs.add_path() in "
        f"Python):{searched}"
    )


def locate(path: AnyPath) -> Location:
    """Return the place that an input path or an address, such as `https://...`, leads to.

    Raises:
        ModelNotFoundError: a path exists nowhere; the message lists the places searched.
        MechaError: nothing here can read such an address.
    """
    return locations.locate(path if locations.is_address(path) else resolve_input(path))


def resolve_output(path: AnyPath) -> Path:
    """Return where an output goes: a relative path into the first model directory, if there is any."""
    return _search_path()[0] / _expanded(path)


def _places(path: AnyPath) -> list[Path]:
    """Where an input path may lead, in order."""
    path = Path(_expanded(path))
    return [path] if path.is_absolute() else [directory / path for directory in _search_path()]


def _expanded(path: AnyPath) -> str:
    try:
        return os.path.expanduser(os.fspath(path))
    except ValueError:  # no user has a NUL in the name
        return os.fspath(path)


def _search_path() -> list[Path]:
    directories = get_all()
    here = Path.cwd()
    return directories if here in directories else [*directories, here]
