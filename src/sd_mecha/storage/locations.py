"""Where a file or a folder lies: on this computer, or at an address that a library knows how to read."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from sd_mecha.errors import FileFormatError, MechaError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.contract import ByteSource
from sd_mecha.storage.files import RangeFile
from sd_mecha.storage.foreign import HEAD_SIZE

T = TypeVar("T")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:// is a drive


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as `https://host/file` rather than a place on this computer."""
    return bool(_ADDRESS.match(os.fspath(path)))


class Location(ABC):
    """A place that may hold a file or a folder. Making one looks at nothing.

    Attributes:
        name: what messages call it: its path or address.
    """

    name: str

    @property
    @abstractmethod
    def basename(self) -> str:
        """The last part of its name."""

    @abstractmethod
    def is_file(self) -> bool:
        """Whether there is a file that can be opened."""

    @abstractmethod
    def is_folder(self) -> bool:
        """Whether there is a folder."""

    @abstractmethod
    def children(self) -> list[str]:
        """The names of what lies in a folder, sorted; nothing where there is none."""

    @abstractmethod
    def parent(self) -> Location:
        """The folder it lies in."""

    @abstractmethod
    def open(self) -> ByteSource:
        """The file.

        Raises:
            ModelNotFoundError, ModelAccessError: there is none, or it cannot be read.
        """

    @abstractmethod
    def _below(self, parts: tuple[str, ...]) -> Location: ...

    def child(self, name: str) -> Location:
        """What lies in the folder under a relative name, which may come from an untrusted file.

        Raises:
            FileFormatError: the name leads out of the folder.
        """
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or ".." in parts or parts[0] == "/" or re.search(r"[\\:\0]", name):
            raise FileFormatError(f"{self.name}: names a file {name!r}; expected one within the folder itself")
        return self._below(parts)

    @cached_property
    def head(self) -> bytes:
        """The first bytes of the file, by which formats are told apart; empty where there is no file."""
        if not self.is_file():
            return b""
        try:
            source = self.open()
        except ModelNotFoundError:
            return b""
        try:
            return source.read(0, min(source.size, HEAD_SIZE))
        finally:
            source.close()

    def read(self, limit: int) -> bytes:
        """A small file as a whole.

        Raises:
            FileFormatError: it is larger than `limit` bytes.
        """
        source = self.open()
        try:
            if source.size > limit:
                raise FileFormatError(f"{self.name}: has {source.size} bytes; expected at most {limit}")
            return source.read(0, source.size)
        finally:
            source.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class LocalLocation(Location):
    """A place in the file system.

    Args:
        path: where; relative to the working directory if it is relative.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self.name = str(self.path)

    @property
    def basename(self) -> str:
        return self.path.name

    def is_file(self) -> bool:
        return ask(Path.is_file, self.path)

    def is_folder(self) -> bool:
        return ask(Path.is_dir, self.path)

    def children(self) -> list[str]:
        return sorted(ask(os.listdir, self.path)) if self.is_folder() else []

    def parent(self) -> LocalLocation:
        return LocalLocation(self.path.parent)

    def open(self) -> ByteSource:
        return RangeFile(self.path)

    def _below(self, parts: tuple[str, ...]) -> LocalLocation:
        return LocalLocation(self.path.joinpath(*parts))


def ask(question: Callable[[Path], T], path: Path, named: Path | None = None) -> T:
    """The answer of the system to a question about a path.

    Args:
        question: what is asked.
        path: what about.
        named: what messages call it; by default, where a folder on the way may not be looked into, that folder.

    Raises:
        ModelAccessError: there is no answer, because of permissions or of a name that is too long.
    """
    try:
        return question(path)
    except OSError as error:
        step = "check the path"
        if isinstance(error, PermissionError):
            step = "check its permissions"
            named = named or next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
        name = str(named or path)
        raise ModelAccessError(f"model {name!r} cannot be opened: {error.strerror or error}; {step}") from error


def locate(path: str | os.PathLike[str]) -> Location:
    """The place that a path or an address names.

    Raises:
        MechaError: nothing here knows how to read such an address.
    """
    if not is_address(path):
        return LocalLocation(path)
    from sd_mecha.storage.remote.addresses import shown_path  # it needs a library that is an extra
    from sd_mecha.storage.remote.location import RemoteLocation

    try:
        return RemoteLocation(os.fspath(path))
    except ValueError as error:
        if isinstance(error, MechaError):
            raise
        shown = shown_path(os.fspath(path))
        raise ModelNotFoundError(f"model {shown!r} is no address that can be read: {error}; check it") from error
