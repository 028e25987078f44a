"""Reading GGUF files by range: plain tensors as they are, quantised ones as the float32 values that they stand for."""

from __future__ import annotations

from collections.abc import Mapping

from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import TensorEntry, check_range, flat_bytes
from sd_mecha.storage.dtypes import dtype_name
from sd_mecha.storage.file_reader import FileReader
from sd_mecha.storage.gguf.cursor import RECIPE, WRITTEN
from sd_mecha.storage.gguf.header import Place, read_header
from sd_mecha.storage.gguf.kinds import PLAIN, Kind, dequantised
from sd_mecha.storage.gguf.layout import RECIPE_KEY

_PIECE = 1 << 16  # values that are worked out at once; a multiple of every block, and small enough for the cache
_ITEM = 4  # bytes of a float32


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
        self.metadata = {RECIPE_KEY if key == RECIPE else key: value for key, value in texts.items()}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of that tensor on; safe from several threads.

        Raises:
            ChangedInputError: the file was replaced or shortened meanwhile.
        """
        view = flat_bytes(buffer)
        place = self._places[name]
        check_range(name, start, len(view), self.entries[name].nbytes)
        if not view:
            return
        if place.kind.is_quantised:
            self._read_blocks(place, start, view)
        else:
            self._file.read_into(place.offset + start, view)

    def _read_blocks(self, place: Place, start: int, view: memoryview) -> None:
        kind = place.kind
        done = 0
        while done < len(view):
            at = start + done
            first = at // _ITEM // kind.block
            count = min(_PIECE // kind.block, -(-(start + len(view)) // (_ITEM * kind.block)) - first)
            blocks = bytearray(count * kind.nbytes)
            self._file.read_into(place.offset + first * kind.nbytes, memoryview(blocks))
            skipped = at - first * kind.block * _ITEM
            values = byte_view(dequantised(kind, blocks))[skipped : skipped + len(view) - done]
            view[done : done + len(values)] = values
            done += len(values)
