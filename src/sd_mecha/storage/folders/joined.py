"""Several readers that are shown as one: the shards of a model, the components of a pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from sd_mecha.storage.contract import ByteSource, Reader, TensorEntry, check_unchanged


class JoinedReader:
    """Tensors of several readers.

    Args:
        name: what messages call the whole.
        places: name here -> the reader that has it, and its name there; in the order that reading should take.
        readers: all of them, which this one closes.
        metadata: that of the whole.
        index: the file that says which tensor is where, if there is one; closed with the readers.
        components: the parts that the names here begin with, up to the first dot; none for a model that is one part.
        made: the components that the merge which wrote it made, where it says so; others were copied.
    """

    def __init__(
        self,
        name: str,
        places: Mapping[str, tuple[Reader, str]],
        readers: Sequence[Reader],
        metadata: Mapping[str, str],
        index: ByteSource | None = None,
        components: Sequence[str] = (),
        made: Collection[str] | None = None,
    ) -> None:
        self.name = name
        self.metadata = dict(metadata)
        self.components = tuple(components)
        self.made = made
        self.entries: Mapping[str, TensorEntry] = {
            here: reader.entries[there] for here, (reader, there) in places.items()
        }
        self._places = dict(places)
        self._readers = list(readers)
        self._index = index

    @property
    def fingerprint(self) -> str:
        """What follows from those of the index and of all readers; an AttributeError where one has none."""
        parts = [reader.fingerprint for reader in self._readers]  # type: ignore[attr-defined]
        parts += [] if self._index is None else [self._index.fingerprint]
        return f"{self.name} {hashlib.sha256(repr(parts).encode('utf-8', 'surrogatepass')).hexdigest()}"

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of that tensor on; as safe as the reader that has it."""
        reader, there = self._places[name]
        reader.read_into(there, start, buffer)

    def check_unchanged(self) -> None:
        """Raise ChangedInputError if any of the files is not the one that was opened any more."""
        if self._index is not None:
            self._index.check_unchanged()
        for reader in self._readers:
            check_unchanged(reader)

    def close(self) -> None:
        """Close all readers."""
        close_all(self._readers)
        if self._index is not None:
            self._index.close()


def close_all(readers: Iterable[Reader]) -> None:
    """Close some readers."""
    for reader in readers:
        reader.close()


def copied_tensors(reader: Reader) -> frozenset[str]:
    """The tensors of a pipeline that the merge which wrote it did not make, but copied."""
    made = getattr(reader, "made", None)
    return frozenset(name for name in reader.entries if made is not None and name.partition(".")[0] not in made)


def lost_components(reader: Reader) -> list[str]:
    """The components of a pipeline that a merge made, and of which there are no weights any more."""
    components = getattr(reader, "components", ())
    return sorted(part for part in getattr(reader, "made", None) or () if part not in components)


def join_components(name: str, readers: Mapping[str, Reader], made: Collection[str] | None = None) -> JoinedReader:
    """The components of a pipeline as one model, whose names are `COMPONENT.NAME`.

    Args:
        name: what messages call the pipeline.
        readers: component -> its tensors.
        made: the components that the merge which wrote it made: the first has the metadata of the whole. None: any.
    """
    places = {f"{part}.{there}": (reader, there) for part, reader in readers.items() for there in reader.entries}
    metadata = next((reader.metadata for part, reader in readers.items() if made is None or part in made), {})
    return JoinedReader(name, places, list(readers.values()), metadata, components=list(readers), made=made)
