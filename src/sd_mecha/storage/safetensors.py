"""Reading and writing safetensors files by range."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from sd_mecha.storage.contract import ByteSource, TensorEntry, check_range, flat_bytes
from sd_mecha.storage.file_reader import FileReader
from sd_mecha.storage.files import RangeFile
from sd_mecha.storage.foreign import HEAD_SIZE
from sd_mecha.storage.placed_writer import Layout, PlacedWriter
from sd_mecha.storage.safetensors_header import PREFIX_SIZE, build_header, header_size, parse_header

_ALIGNMENT = 8  # of the data within the file, so that memory-mapped tensors are aligned


class SafetensorsReader(FileReader):
    """A safetensors file. Opening reads and checks its whole header, and no data.

    Args:
        file: the file, which the reader closes, or its path.
        requested: what the user asked for, shown beside the path when it is not found.

    Raises:
        ModelNotFoundError: there is no readable file.
        FileFormatError: the file breaks a rule of the format.
    """

    def __init__(self, file: ByteSource | str | os.PathLike[str], *, requested: str | None = None) -> None:
        super().__init__(RangeFile(file, requested=requested) if isinstance(file, str | os.PathLike) else file)

    def _open(self) -> None:
        head = self._file.read(0, min(self._file.size, HEAD_SIZE))
        length = header_size(head, self._file.size, self.name)
        raw = self._file.read(PREFIX_SIZE, length)
        data = PREFIX_SIZE + length
        self.entries, self.metadata = parse_header(raw, self._file.size - data, self.name)
        self._places = _places(self.entries, data)

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


class SafetensorsWriter(PlacedWriter):
    """Writes a safetensors file; see `PlacedWriter`.

    Tensors lie in declared order, wider dtypes first so that every tensor is aligned.
    """

    def _lay_out(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], room: int | None) -> Layout:
        ordered = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))
        try:
            header = build_header(ordered, metadata)
        except ValueError as error:
            self._refuse(error)
        needed = PREFIX_SIZE + len(header)
        if room is None:
            room = -(-needed // _ALIGNMENT) * _ALIGNMENT
        elif needed > room:
            self._refuse(f"the header needs {needed} bytes; {room} were reserved for what was declared")
        header = header.ljust(room - PREFIX_SIZE)  # a header without dropped tensors is shorter: spaces fill its room
        size = room + sum(entry.nbytes for entry in ordered.values())
        return Layout(struct.pack("<Q", len(header)) + header, _places(ordered, room), size)


def _places(entries: Mapping[str, TensorEntry], offset: int) -> dict[str, tuple[int, int]]:
    """Where each tensor starts in the file, and its size, for tensors that lie one after the other."""
    places = {}
    for name, entry in entries.items():
        nbytes = entry.nbytes
        places[name] = (offset, nbytes)
        offset += nbytes
    return places
