"""A model whose tensors go by other names."""

from __future__ import annotations

from collections.abc import Mapping

from sd_mecha.storage.contract import Reader, TensorEntry


class RenamedReader:
    """Another reader, some of whose tensors have other names here.

    Args:
        reader: where the tensors are.
        names: name there -> name here; the others keep theirs.
    """

    def __init__(self, reader: Reader, names: Mapping[str, str]) -> None:
        self._reader = reader
        self._stored = {here: there for there, here in names.items()}
        self.entries: Mapping[str, TensorEntry] = {
            names.get(name, name): entry for name, entry in reader.entries.items()
        }

    @property
    def name(self) -> str:
        return self._reader.name

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._reader.metadata

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self._reader.read_into(self._stored.get(name, name), start, buffer)

    def close(self) -> None:
        self._reader.close()

    def check_unchanged(self) -> None:
        """Refuse a file that was changed since it was opened, where the reader can tell."""
        getattr(self._reader, "check_unchanged", lambda: None)()
