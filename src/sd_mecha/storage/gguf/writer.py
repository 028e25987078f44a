"""Writing GGUF files by range: plain floats, and matrices as Q8_0."""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Mapping
from functools import partial

import torch

from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import TensorEntry, check_range, flat_bytes
from sd_mecha.storage.dtypes import dtype_name
from sd_mecha.storage.gguf.cursor import MAX_HEADER
from sd_mecha.storage.gguf.kinds import Kind, kind_of, quantised_8, read_values
from sd_mecha.storage.gguf.layout import build_layout, key_values, kind_for
from sd_mecha.storage.placed_writer import Layout, PlacedWriter

_PIECE = 1 << 16  # values that are converted at once; a multiple of every block, and small enough for the cache
_LONG_NAME = 64  # bytes
_logger = logging.getLogger("sd_mecha")


class GgufWriter(PlacedWriter):
    """Writes a GGUF file of known tensors in any order, in place, from any number of threads.

    Tensors keep their dtype, except that those of fewer than two dimensions become float32 and, where that is wanted,
    matrices become Q8_0. These are converted as their bytes come; only the values of blocks that come in several parts
    are kept until they are complete.

    A file that takes over no keys has no `general.architecture`: programs for image models then find it out from the
    names of the tensors, and llama.cpp needs much more than that to run a model.

    Args:
        path: the file.
        keys: those of another file that go along, as `layout.taken_over` returns them.
        quantised: whether matrices become Q8_0.
        resume: what the output is made of, for a writer that goes on where one with the same fingerprint stopped.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keys: Mapping[str, bytes] | None = None,
        quantised: bool = False,
        resume: str | None = None,
    ) -> None:
        super().__init__(path, resume=resume)
        self._keys = dict(keys or {})
        self._quantised = quantised
        self._kinds: dict[str, Kind] = {}
        self._dtypes: dict[str, TensorEntry] = {}
        self._parts: dict[tuple[str, int], tuple[bytearray, list[int]]] = {}
        self._parts_lock = threading.Lock()

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        self._kinds = {name: self._kind(name, entry) for name, entry in entries.items()}
        self._dtypes = dict(entries)
        long = sum(len(name.encode(errors="replace")) >= _LONG_NAME for name in entries)
        if long:
            message = "%s: %s names have %s bytes or more; llama.cpp does not read such a file, others do"
            _logger.warning(message, self.name, long, _LONG_NAME)
        super().declare(entries, metadata)

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        if self._kinds[name].dtype == self._dtypes[name].dtype and not self._kinds[name].is_quantised:
            return super().write(name, start, buffer)
        return self._convert(name, start, flat_bytes(buffer))

    @property
    def as_read(self) -> dict[str, TensorEntry]:
        """The declared tensors as `read_back` gives them, which is as `GgufReader` will.

        Raises:
            UnknownFormatError: one is quantised, and the gguf package, which reads it, is not installed.
        """
        kinds = {n: kind_of(kind.number, f"output {self.name!r}: tensor {n!r}") for n, kind in self._kinds.items()}
        return {name: TensorEntry(entry.shape, kinds[name].dtype) for name, entry in self._entries.items()}

    def read_back(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of a tensor that was written and not dropped, as `as_read` has it."""
        read_values(partial(super().read_back, name), self._kinds[name], start, flat_bytes(buffer))

    def drop(self, name: str) -> None:
        super().drop(name)
        with self._parts_lock:
            for key in [key for key in self._parts if key[0] == name]:
                del self._parts[key]

    def _lay_out(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], room: int | None) -> Layout:
        tensors = {name: (entry.shape, self._kinds[name]) for name, entry in entries.items()}
        dtypes = {dtype_name(entry.dtype) for entry in entries.values() if entry.dtype.is_floating_point}
        try:
            layout = build_layout(key_values(self._keys, metadata, tensors, " ".join(sorted(dtypes))), tensors)
        except (UnicodeEncodeError, struct.error) as error:
            self._refuse(f"a name, a text or a shape is nothing that GGUF can hold: {error}")
        if len(layout.header) > MAX_HEADER:
            self._refuse(f"the header would have {len(layout.header)} bytes; at most {MAX_HEADER} are read again")
        if room is not None and len(layout.header) > room:
            self._refuse(f"the header would have {len(layout.header)} bytes, and {room} are kept for it")
        return layout

    def _kind(self, name: str, entry: TensorEntry) -> Kind:
        kind = kind_for(entry.shape, entry.dtype, quantised=self._quantised)
        if kind is None:
            step = "choose float32, float16 or bfloat16 for the output"
            if not entry.dtype.is_floating_point:  # it keeps its dtype, whatever is chosen
                step = "they hold floats and int8 to int64; leave it out of the inputs, or store it there as such"
            self._refuse(f"tensor {name!r} is {dtype_name(entry.dtype)}, which GGUF files do not hold; {step}")
        return kind

    def _convert(self, name: str, start: int, view: memoryview) -> None:
        """Split a range into whole blocks, which are stored, and what is left of others at its ends, which is kept."""
        entry = self._dtypes[name]
        end = start + len(view)
        check_range(name, start, len(view), entry.nbytes)
        unit = self._kinds[name].block * entry.dtype.itemsize
        first, last = -(-start // unit), end // unit
        if first > last:
            return self._keep(name, last, start - last * unit, view)
        if start < first * unit:
            self._keep(name, first - 1, start - (first - 1) * unit, view[: first * unit - start])
        self._store(name, first, view[first * unit - start : last * unit - start])
        if last * unit < end:
            self._keep(name, last, 0, view[last * unit - start :])
        return None

    def _keep(self, name: str, block: int, start: int, part: memoryview) -> None:
        unit = self._kinds[name].block * self._dtypes[name].dtype.itemsize
        with self._parts_lock:
            whole, missing = self._parts.setdefault((name, block), (bytearray(unit), [unit]))
            whole[start : start + len(part)] = part
            missing[0] -= len(part)
            if missing[0]:
                return
            del self._parts[name, block]
        self._store(name, block, memoryview(whole))

    def _store(self, name: str, block: int, view: memoryview) -> None:
        kind, dtype = self._kinds[name], self._dtypes[name].dtype
        step = _PIECE * dtype.itemsize
        for at in range(0, len(view), step):
            part = view[at : at + step]
            values = torch.empty(len(part) // dtype.itemsize, dtype=dtype)
            byte_view(values)[:] = part
            stored = quantised_8(values) if kind.is_quantised else values.to(kind.dtype)
            first = block + at // dtype.itemsize // kind.block
            super().write(name, first * kind.nbytes, byte_view(stored))
