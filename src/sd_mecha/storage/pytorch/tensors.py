"""Tensors that lie in storages within a file: checked against it when it is opened, read from it by range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import ByteSource, TensorEntry, check_range, flat_bytes
from sd_mecha.storage.dtypes import TO_SAFETENSORS, dtype_name
from sd_mecha.storage.pytorch.names import Storage, StoredTensor, UnreadableTensor
from sd_mecha.storage.pytorch.strided import WORDS, Strided, boxes, check_strided, gather
from sd_mecha.storage.strict_json import brief

_NEGATED = (torch.float16, torch.float32, torch.float64, torch.complex64)  # imaginary parts of conjugates
_LARGEST_EXPANSION = 2**31  # bytes that a tensor may have beyond those in the file, by repeating elements


class Place:
    """Where the bytes of a storage begin. A header in front of them says so, read when they are first needed.

    Args:
        where: the place, or what reads the header; that is let go of afterwards.
        order: tells storages that lie earlier in the file from later ones.
    """

    __slots__ = ("_where", "order")

    def __init__(self, where: Callable[[], int] | int, order: int = 0) -> None:
        self._where = where
        self.order = order

    @property
    def offset(self) -> int:
        where = self._where
        if not isinstance(where, int):
            where = self._where = where()
        return where


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor in a file.

    Attributes:
        entry: its shape and dtype.
        place: where its storage begins.
        view: which elements of the storage are its own.
        swapped: whether the bytes of each number lie the other way round.
        conjugate, negative: whether its values are those of the storage, conjugated or negated.
    """

    entry: TensorEntry
    place: Place
    view: Strided
    swapped: bool = False
    conjugate: bool = False
    negative: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether its bytes lie in the file as they should be."""
        return not (self.swapped or self.conjugate or self.negative) and self.view.is_contiguous

    def read_into(self, file: ByteSource, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with its bytes, row by row, from byte `start` on."""
        target = flat_bytes(buffer)
        check_range(name, start, len(target), self.entry.nbytes)
        if not target:
            return
        item = self.entry.dtype.itemsize
        if self.is_plain:
            file.read_into(self.place.offset + self.view.offset * item + start, target)
            return
        first, last = start // item, -(-(start + len(target)) // item)
        values, done = torch.empty(last - first, dtype=WORDS[item]), 0
        for starts, sizes in boxes(self.entry.shape, first, last):
            count = math.prod(sizes)
            self.read_box(file, starts, values[done : done + count].view(sizes))
            done += count
        target[:] = byte_view(values)[start - first * item :][: len(target)]

    def read_box(self, file: ByteSource, starts: tuple[int, ...], out: Tensor) -> None:
        """Fill `out`, of integers of the right size, with a box of its elements."""
        item = self.entry.dtype.itemsize
        base = self.place.offset

        def fetch(first: int, count: int) -> Tensor:
            words = torch.empty(count, dtype=WORDS[item])
            file.read_into(base + first * item, byte_view(words))
            if self.swapped:
                part = item // 2 if self.entry.dtype.is_complex else item
                words.view(WORDS[part]).numpy().byteswap(inplace=True)
            return words

        gather(fetch, self.view.part(starts, tuple(out.shape)), out)
        if self.conjugate:
            torch.view_as_real(out.view(self.entry.dtype))[..., 1].neg_()
        if self.negative:
            out.view(self.entry.dtype).neg_()


def place_tensor(
    key: str, found: object, find: Callable[[Storage], Place], source: str, *, file_size: int, swapped: bool = False
) -> PlacedTensor:
    """Check what a pickle says of a tensor.

    Args:
        key: its name in the model.
        found: what the pickle says.
        find: the place of a storage; a ValueError says what is wrong with it.
        source: what messages call the file.
        file_size: bytes of the file.
        swapped: whether the file was written with the bytes of numbers the other way round.

    Raises:
        FileFormatError: it is no tensor that can be read.
    """

    def fail(problem: str) -> NoReturn:
        raise FileFormatError(f"{source}: tensor {brief(key)}: {problem}")

    if type(found) is UnreadableTensor:
        fail(f"it is {found.what}; only dense tensors can be read. Make it dense and save the file again")
    assert type(found) is StoredTensor
    storage, dtype = found.storage, found.dtype
    if dtype not in TO_SAFETENSORS:
        fail(f"its dtype {dtype_name(dtype)} cannot be merged; convert it and save the file again")
    try:
        place = find(storage)
        view = check_strided(found.offset, found.shape, found.strides, dtype.itemsize)
    except ValueError as error:
        fail(str(error))
    entry = TensorEntry(view.shape, dtype)
    if (view.offset + view.reach) * dtype.itemsize > storage.nbytes and view.reach:
        fail(
            f"it reaches to byte {(view.offset + view.reach) * dtype.itemsize} of storage {brief(storage.key)}, "
            f"which has {storage.nbytes}"
        )
    if entry.nbytes > max(file_size, _LARGEST_EXPANSION):
        fail(f"it repeats the elements in the file to {entry.nbytes} bytes; expected at most {_LARGEST_EXPANSION}")
    flags = found.metadata if type(found.metadata) is dict else {}
    conjugate, negative = bool(flags.get("conj")), bool(flags.get("neg"))
    if conjugate and not dtype.is_complex:
        fail(f"it is marked as conjugated, but {dtype_name(dtype)} is not complex")
    if negative and dtype not in _NEGATED:
        fail(f"it is marked as negated, which {dtype_name(dtype)} never is")
    return PlacedTensor(entry, place, view, swapped and dtype.itemsize > 1, conjugate, negative)
