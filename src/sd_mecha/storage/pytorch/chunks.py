"""The chunks of a tensor of a distributed checkpoint: that they make it up, and reading them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import ByteSource, TensorEntry
from sd_mecha.storage.pytorch.reader import is_tensor, open_archive
from sd_mecha.storage.pytorch.tensors import Place, PlacedTensor
from sd_mecha.storage.strict_json import brief

_MAX_COMPARISONS = 5_000_000
_LARGEST_PART = 2**16  # bytes of the directory, and of the pickle, of one chunk; both have a few hundred


class Slice:
    """A part of a file, as a file; closing it leaves the file open."""

    def __init__(self, file: ByteSource, begin: int, size: int) -> None:
        self._file = file
        self._begin = begin
        self.size = size
        self.name = f"{file.name} (from byte {begin} on)"

    @property
    def fingerprint(self) -> str:
        return f"{self._file.fingerprint} {self._begin} {self.size}"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + buffer.nbytes > self.size:
            raise FileFormatError(f"{self.name}: {buffer.nbytes} bytes at byte {offset} lie outside of its {self.size}")
        self._file.read_into(self._begin + offset, buffer)

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        pass


class Chunk:
    """A box of a tensor, saved as a tensor of its own. There may be very many of them.

    Args:
        key: the tensor.
        file: where it lies.
        begin, length: the part of the file.
        entry: shape and dtype that it should have.
        offsets: where it begins in the tensor.
    """

    __slots__ = ("_entry", "_tensor", "begin", "file", "key", "length", "offsets")

    def __init__(
        self, key: str, file: ByteSource, begin: int, length: int, entry: TensorEntry, offsets: tuple[int, ...]
    ) -> None:
        self.key = key
        self.file = file
        self.begin = begin
        self.length = length
        self.offsets = offsets
        self._entry = entry
        self._tensor: PlacedTensor | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """How large it is in each dimension."""
        return self._entry.shape

    def tensor(self) -> PlacedTensor:
        """Where its bytes are.

        Raises:
            FileFormatError: what is stored is something else.
        """
        if self._tensor is None:
            part = Slice(self.file, self.begin, self.length)
            content = open_archive(part, _LARGEST_PART)
            if not is_tensor(content.value):
                raise FileFormatError(f"{part.name}: holds {brief(content.value)}; expected tensor {brief(self.key)}")
            placed = content.place(self.key, content.value, part)
            if placed.entry != self._entry:
                raise FileFormatError(
                    f"{part.name}: tensor {brief(self.key)} is {placed.entry} there, but {self._entry} in .metadata"
                )
            self._tensor = replace(placed, entry=self._entry, place=Place(self.begin + placed.place.offset))
        return self._tensor

    def read_common(self, starts: tuple[int, ...], out: Tensor) -> None:
        """Fill the part of a box of the tensor that lies in this chunk; the box begins at `starts`."""
        inner, within = [], out
        for dim, (start, offset, size) in enumerate(zip(starts, self.offsets, self.sizes, strict=True)):
            first, last = max(start, offset), min(start + out.shape[dim], offset + size)
            if first >= last:
                return
            inner.append(first - offset)
            within = within.narrow(dim, first - start, last - first)
        self.tensor().read_box(self.file, tuple(inner), within)


def check_apart(source: str, chunks: Iterable[Chunk]) -> None:
    """Check that no two chunks lie in the same bytes: every one is written on its own, tied weights too.

    Args:
        source: what messages call the folder.
        chunks: all of them.

    Raises:
        FileFormatError: two do. Many chunks in few bytes would cost more than the files are large.
    """
    ordered = sorted(chunks, key=lambda chunk: (chunk.file.name, chunk.begin))
    for one, two in itertools.pairwise(ordered):
        if one.file is two.file and one.begin + one.length > two.begin:
            raise FileFormatError(
                f"{source}: chunks of tensors {brief(one.key)} and {brief(two.key)} share bytes from byte {two.begin} "
                f"of {two.file.name} on; expected that each has its own. Save the checkpoint again"
            )


def check_cover(source: str, key: str, shape: tuple[int, ...], chunks: Sequence[Chunk], compared: int) -> int:
    """Check that chunks make up a tensor, without holes or overlaps.

    Args:
        source, key: what messages call the file and the tensor.
        shape: the tensor's.
        chunks: of it.
        compared: how many comparisons were made before; their number is bounded.

    Returns:
        How many comparisons were made now.

    Raises:
        FileFormatError: they do not make it up.
    """
    volume = 0
    for chunk in chunks:
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
            raise FileFormatError(f"{source}: tensor {brief(key)}: a chunk has other dimensions than {shape}")
        if any(o + s > total for o, s, total in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            raise FileFormatError(
                f"{source}: tensor {brief(key)}: the chunk {chunk.sizes} at {chunk.offsets} leaves its shape {shape}"
            )
        volume += math.prod(chunk.sizes)
    if volume != math.prod(shape):
        raise FileFormatError(
            f"{source}: tensor {brief(key)}: its chunks have {volume} elements, expected {math.prod(shape)} for {shape}"
        )
    filled = sorted((c for c in chunks if 0 not in c.sizes), key=lambda chunk: chunk.offsets)
    cut = {dim for chunk in filled for dim, size in enumerate(chunk.sizes) if size != shape[dim]}
    if len(cut) <= 1:  # slices of one dimension: neighbours suffice
        dim = cut.pop() if cut else 0
        pairs = list(itertools.pairwise(filled))
        overlap = any(shape and a.offsets[dim] + a.sizes[dim] > b.offsets[dim] for a, b in pairs)
        overlap = overlap or (not cut and not shape and len(filled) > 1)
        count = 0
    else:
        count = len(filled) ** 2
        if compared + count > _MAX_COMPARISONS:
            raise FileFormatError(f"{source}: tensor {brief(key)}: it lies in {len(filled)} chunks, too many to check")
        begins = torch.tensor([chunk.offsets for chunk in filled])
        ends = begins + torch.tensor([chunk.sizes for chunk in filled])
        common = torch.ones(len(filled), len(filled), dtype=torch.bool)
        for dim in range(len(shape)):
            common &= (begins[:, None, dim] < ends[None, :, dim]) & (begins[None, :, dim] < ends[:, None, dim])
        overlap = int(common.sum()) > len(filled)
    if overlap:
        raise FileFormatError(f"{source}: tensor {brief(key)}: its chunks overlap")
    return count
