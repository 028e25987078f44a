"""Models that are shown in another way than they are stored: here, by other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sd_mecha.storage.contract import Reader, TensorEntry, check_unchanged


class ReaderView:
    """What a reader that shows another one in a different way shares with it."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @property
    def name(self) -> str:
        return self._reader.name

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._reader.metadata

    def close(self) -> None:
        self._reader.close()

    @property
    def components(self) -> Sequence[str]:
        """The parts that a pipeline is made of; none for any other model."""
        return getattr(self._reader, "components", ())

    @property
    def fingerprint(self) -> str:
        """That of the other reader; an AttributeError where that has none."""
        return self._reader.fingerprint  # type: ignore[attr-defined, no-any-return]

    def check_unchanged(self) -> None:
        """Refuse a file that was changed since it was opened, where the reader can tell."""
        check_unchanged(self._reader)


class RenamedReader(ReaderView):
    """Another reader, some of whose tensors have other names here.

    Args:
        reader: where the tensors are.
        names: name there -> name here; the others keep theirs.
    """

    def __init__(self, reader: Reader, names: Mapping[str, str]) -> None:
        super().__init__(reader)
        self._stored = {here: there for there, here in names.items()}
        self.entries: Mapping[str, TensorEntry] = {
            names.get(name, name): entry for name, entry in reader.entries.items()
        }

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self._reader.read_into(self._stored.get(name, name), start, buffer)
