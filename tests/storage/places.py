"""Places that are like addresses, without a network."""

from __future__ import annotations

from pathlib import Path

from sd_mecha.storage.contract import ByteSource
from sd_mecha.storage.locations import LocalLocation, Location


class Unlisted(Location):
    """A place like an address whose folders cannot be listed."""

    def __init__(self, path: Path) -> None:
        self._at = LocalLocation(path)
        self.name = f"test://{path}"

    @property
    def basename(self) -> str:
        return self._at.basename

    def is_file(self) -> bool:
        return self._at.is_file()

    def is_folder(self) -> bool:
        return False

    def children(self) -> list[str]:
        return []

    def parent(self) -> Location:
        return Unlisted(self._at.path.parent)

    def open(self) -> ByteSource:
        return self._at.open()

    def _below(self, parts: tuple[str, ...]) -> Location:
        return Unlisted(self._at.path.joinpath(*parts))
