"""What tensors become when they are written to a GGUF file and read again, to compare them with those that it has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.gguf.kinds import QUANTISED_8, Kind, dequantised, quantised_8
from sd_mecha.storage.gguf.layout import kind_for
from sd_mecha.storage.gguf.reader import GgufReader


class StoredForms:
    """The forms that the tensors of a file have in it; those of another format are as they were.

    Args:
        reader: the file.
    """

    def __init__(self, reader: Reader) -> None:
        self._kinds: Mapping[str, Kind] = reader.kinds if isinstance(reader, GgufReader) else {}

    def entry(self, name: str, entry: TensorEntry) -> TensorEntry:
        """What would be read of a tensor that was written as that."""
        kind = self._kinds.get(name)
        if kind is None or not entry.dtype.is_floating_point:
            return entry
        if not kind.is_quantised:
            kind = kind_for(entry.shape, entry.dtype, quantised=False)
        return entry if kind is None else TensorEntry(entry.shape, kind.dtype)

    def values(self, name: str, values: Tensor) -> Tensor:
        """What would be read of those values, which are whole blocks in one dimension."""
        kind = self._kinds.get(name)
        if kind == QUANTISED_8:
            return dequantised(kind, bytearray(byte_view(quantised_8(values))))
        return values if kind is None else values.to(kind.dtype)

    def foreign(self, name: str) -> str:
        """The kind of a tensor that only other programs write, so that its values cannot be made again; or nothing."""
        kind = self._kinds.get(name)
        return kind.name if kind is not None and kind.is_quantised and kind != QUANTISED_8 else ""
