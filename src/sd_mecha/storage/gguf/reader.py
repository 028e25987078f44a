"""Reading GGUF files by range: plain tensors as they are, quantised ones as the float32 values that they stand for."""

from __future__ import annotations

from collections.abc import Mapping

from sd_mecha.storage.contract import TensorEntry, check_range, flat_bytes
from sd_mecha.storage.dtypes import dtype_name
from sd_mecha.storage.file_reader import FileReader
from sd_mecha.storage.gguf.cursor import WRITTEN
from sd_mecha.storage.gguf.header import read_header
from sd_mecha.storage.gguf.kinds import PLAIN, Kind, read_values
from sd_mecha.storage.gguf.layout import OUR_NAMES

_COMMON_NAMES = {key: name for name, key in OUR_NAMES.items()}


class GgufReader(FileReader):
    """A GGUF file. Opening reads and checks its whole header, and no data.

    Args:
        file: the file, which the reader closes.

    Attributes:
        kinds: how the file stores each tensor.
        written_dtypes: those that its floats had before they took the form in which it stores them, if it says so.

    Raises:
        FileFormatError: the file breaks a rule of the format, or has a tensor of an unknown kind.
        UnknownFormatError: a tensor is quantised, and the gguf package is not installed.
    """

    def _open(self) -> None:
        keys, self._places = read_header(self._file)
        self.entries = {name: TensorEntry(place.shape, place.kind.dtype) for name, place in self._places.items()}
        self.kinds: Mapping[str, Kind] = {name: place.kind for name, place in self._places.items()}
        texts = {key: value for key, value in keys.values.items() if isinstance(value, str)}
        written = texts.pop(WRITTEN, "").split()
        self.written_dtypes = {dtype for dtype in PLAIN if dtype.is_floating_point and dtype_name(dtype) in written}
        self.metadata = {_COMMON_NAMES.get(key, key): value for key, value in texts.items()}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of that tensor on; safe from several threads.

        Raises:
            ChangedInputError: the file was replaced or shortened meanwhile.
        """
        view = flat_bytes(buffer)
        place = self._places[name]
        check_range(name, start, len(view), self.entries[name].nbytes)
        if view:
            read_values(lambda at, part: self._file.read_into(place.offset + at, part), place.kind, start, view)
