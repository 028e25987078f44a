"""Files and folders at an address: `https://`, `s3://`, `hf://` and whatever else fsspec knows."""

from __future__ import annotations

from functools import cached_property

from sd_mecha.errors import ModelNotFoundError
from sd_mecha.storage.foreign import HEAD_SIZE
from sd_mecha.storage.locations import Location
from sd_mecha.storage.remote import addresses
from sd_mecha.storage.remote.file import PATIENCE, RemoteFile, find
from sd_mecha.storage.remote.filesystems import FilesystemPlace
from sd_mecha.storage.remote.places import Found, Place
from sd_mecha.storage.remote.web import WebPlace


class RemoteLocation(Location):
    """A place at an address.

    It is asked at most once what stands there, and what it opens is what it found then: formats look at a
    location one after another, and must all see the same file.

    Args:
        place: the address, or a place that was made of it.

    Raises:
        MechaError: nothing here knows how to read such an address, or a library for it is missing.
    """

    def __init__(self, place: str | Place) -> None:
        if isinstance(place, str):
            place = WebPlace(place) if addresses.is_web(place) else FilesystemPlace(place)
        self._place = place
        self.name = place.name

    @property
    def basename(self) -> str:
        return self._place.basename

    def is_file(self) -> bool:
        try:
            return self._found is not None
        except ModelNotFoundError:
            return False

    def is_folder(self) -> bool:
        return self._is_folder

    def children(self) -> list[str]:
        return PATIENCE.run(self._place.children, self._unreachable)

    def parent(self) -> RemoteLocation:
        return RemoteLocation(self._place.above())

    def open(self) -> RemoteFile:
        return RemoteFile(self._place, self._found)

    @cached_property
    def head(self) -> bytes:
        return self._found.head[:HEAD_SIZE] if self.is_file() else b""

    @cached_property
    def _found(self) -> Found:
        return find(self._place)

    @cached_property
    def _is_folder(self) -> bool:
        return PATIENCE.run(self._place.is_folder, self._unreachable)

    def _unreachable(self) -> str:
        return f"{self.name}: cannot be reached"

    def _below(self, parts: tuple[str, ...]) -> RemoteLocation:
        return RemoteLocation(self._place.below(parts))
