"""Reading and writing safetensors files by range."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from sd_mecha.errors import OutputError
from sd_mecha.storage.contract import TensorEntry, check_range, flat_bytes
from sd_mecha.storage.files import RangeFile
from sd_mecha.storage.foreign import HEAD_SIZE
from sd_mecha.storage.output_file import OutputFile
from sd_mecha.storage.safetensors_header import PREFIX_SIZE, build_header, header_size, parse_header

_ALIGNMENT = 8  # of the data within the file, so that memory-mapped tensors are aligned


class SafetensorsReader:
    """A safetensors file. Opening reads and checks its whole header, and no data.

    Args:
        path: where the file is.
        requested: what the user asked for, shown beside the path when it is not found.

    Raises:
        ModelNotFoundError: there is no readable file.
        FileFormatError: the file breaks a rule of the format.
    """

    def __init__(self, path: str | os.PathLike[str], *, requested: str | None = None) -> None:
        self._file = RangeFile(path, requested=requested)
        self.name = self._file.path
        try:
            head = self._file.read(0, min(self._file.size, HEAD_SIZE))
            length = header_size(head, self._file.size, self.name)
            raw = self._file.read(PREFIX_SIZE, length)
            data = PREFIX_SIZE + length
            entries, self.metadata = parse_header(raw, self._file.size - data, self.name)
        except BaseException:
            self._file.close()
            raise
        self.entries: Mapping[str, TensorEntry] = entries
        self._places = _places(entries, data)

    @property
    def file(self) -> RangeFile:
        """The file itself: its identity and size."""
        return self._file

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of that tensor on; safe from several threads.

        Raises:
            ChangedInputError: the file was replaced or shortened meanwhile.
        """
        view = flat_bytes(buffer)
        offset, nbytes = self._places[name]
        check_range(name, start, len(view), nbytes)
        if view:
            self._file.read_into(offset + start, view)

    def check_unchanged(self) -> None:
        """Raise ChangedInputError if the file is not the one that was opened any more."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SafetensorsWriter:
    """Writes a safetensors file of known tensors in any order, in place, from any number of threads.

    The layout follows from the declaration alone: declared order, wider dtypes first so that every tensor is
    aligned. Hence the bytes of the file do not depend on the order of writing. The file appears under its
    name at commit; see `output_file`. Threads must be done writing before `commit` or `abort`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._output = OutputFile(path)
        self.name = self._output.path
        self._entries: dict[str, TensorEntry] = {}
        self._metadata: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._data = 0
        self._dropped: set[str] = set()
        # Lengths of the writes of each tensor; appending to a list needs no lock.
        self._written: dict[str, list[int]] = {}

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        """Lay the file out, create it under a temporary name and reserve its space.

        Raises:
            OutputError: the format cannot hold this, or the file cannot be created; nothing is left behind.
        """
        if self._data:
            raise ValueError(f"{self.name}: declared twice")
        ordered = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))
        header = self._build_header(ordered, metadata)
        data = _round_up(PREFIX_SIZE + len(header))
        self._output.create(data + sum(entry.nbytes for entry in ordered.values()))
        self._entries, self._metadata, self._data = ordered, dict(metadata), data
        self._places = _places(ordered, data)
        self._written = {name: [] for name in ordered}

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        """Store the buffer at byte `start` of that tensor.

        Raises:
            OutputError: the disk refused.
        """
        view = flat_bytes(buffer)
        offset, nbytes = self._places[name]
        check_range(name, start, len(view), nbytes)
        if view:
            self._output.write_at(offset + start, view)
            self._written[name].append(len(view))

    def drop(self, name: str) -> None:
        """Leave that tensor out of the file, written or not."""
        if name not in self._places:
            raise KeyError(name)
        self._dropped.add(name)

    def commit(self) -> None:
        """Close the gaps of dropped tensors, write the header, and let the file appear under its name.

        Raises:
            OutputError: a tensor is incomplete or the disk refused; what the name led to before is still
                there, and the temporary file is gone.
        """
        try:
            self._check_complete()
            kept = {name: entry for name, entry in self._entries.items() if name not in self._dropped}
            end = self._close_gaps(kept)
            # A header without the dropped tensors is shorter: the reserved room is filled with spaces.
            header = self._build_header(kept, self._metadata).ljust(self._data - PREFIX_SIZE)
            self._output.write_at(0, memoryview(struct.pack("<Q", len(header)) + header))
            self._output.publish(end)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove the temporary file. Harmless after commit or a second time."""
        self._output.discard()

    def _build_header(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
        try:
            return build_header(entries, metadata)
        except ValueError as error:
            raise OutputError(f"output {self.name!r}: {error}") from error

    def _check_complete(self) -> None:
        if not self._data:
            raise ValueError(f"{self.name}: commit without declare")
        for name, lengths in self._written.items():
            nbytes, done = self._places[name][1], sum(lengths)
            if done < nbytes and name not in self._dropped:
                got = f"{done} of {nbytes} bytes were written"
                raise OutputError(f"output {self.name!r}: tensor {name!r} is incomplete: {got}")

    def _close_gaps(self, kept: Mapping[str, TensorEntry]) -> int:
        end = self._data
        for name in kept:
            offset, nbytes = self._places[name]
            if offset > end:
                self._output.move_down(offset, end, nbytes)
            end += nbytes
        return end


def _places(entries: Mapping[str, TensorEntry], offset: int) -> dict[str, tuple[int, int]]:
    """Where each tensor starts in the file, and its size, for tensors that lie one after the other."""
    places = {}
    for name, entry in entries.items():
        nbytes = entry.nbytes
        places[name] = (offset, nbytes)
        offset += nbytes
    return places


def _round_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
