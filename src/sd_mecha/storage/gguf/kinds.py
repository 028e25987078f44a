"""How GGUF files store numbers: plain ones as torch does, and quantised ones in blocks that the gguf package knows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sd_mecha.errors import FileFormatError, UnknownFormatError
from sd_mecha.storage.buffers import byte_view

# Number in a file -> its name and torch's dtype of the same bytes.
_PLAIN: dict[int, tuple[str, torch.dtype]] = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    24: ("I8", torch.int8),
    25: ("I16", torch.int16),
    26: ("I32", torch.int32),
    27: ("I64", torch.int64),
    28: ("F64", torch.float64),
    30: ("BF16", torch.bfloat16),
}
Q8_0 = 8
_PIECE = 1 << 16  # values that are worked out at once; a multiple of every block, and small enough for the cache


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to store numbers.

    Attributes:
        number: what files call it.
        name: what people call it.
        block: how many values lie together.
        nbytes: how many bytes such a block takes.
        dtype: what torch sees of it: float32 for what is quantised.
    """

    number: int
    name: str
    block: int
    nbytes: int
    dtype: torch.dtype

    @property
    def is_quantised(self) -> bool:
        """Whether values are worked out from blocks rather than stored as they are."""
        return self.number not in _PLAIN


PLAIN = {dtype: Kind(number, name, 1, dtype.itemsize, dtype) for number, (name, dtype) in _PLAIN.items()}
"""Of the dtypes that a file can hold as they are."""
QUANTISED_8 = Kind(Q8_0, "Q8_0", 32, 34, torch.float32)
"""32 whole numbers from -127 to 127 and, before them, the float16 that they are multiplied by."""


def kind_of(number: int, where: str) -> Kind:
    """The kind that a file names by a number.

    Args:
        number: the number.
        where: the file and the tensor, for messages.

    Raises:
        FileFormatError: nobody knows it, or nobody can turn it into floats.
        UnknownFormatError: the gguf package, which would know, is not installed.
    """
    if number in _PLAIN:
        return PLAIN[_PLAIN[number][1]]
    try:
        return _quantised(number)
    except ImportError as error:
        message = f"{where} is quantised, which needs the gguf package to be read: pip install 'sd-mecha[gguf]'"
        raise UnknownFormatError(message) from error
    except (ValueError, LookupError, NotImplementedError) as error:
        raise FileFormatError(
            f"{where} is stored as kind {number} ({error}); expected one that the installed gguf package can turn into "
            "floats: install a newer one, or convert the file to F16, BF16 or Q8_0"
        ) from error


def dequantised(kind: Kind, blocks: bytearray) -> Tensor:
    """The float32 values of whole blocks.

    >>> dequantised(QUANTISED_8, bytearray(2 * 34)).shape
    torch.Size([64])
    """
    import gguf

    number = gguf.GGMLQuantizationType(kind.number)
    with np.errstate(all="ignore"):  # blocks of a damaged file may stand for inf and nan
        return torch.from_numpy(gguf.dequantize(np.frombuffer(blocks, dtype=np.uint8), number))


def read_values(read: Callable[[int, memoryview], None], kind: Kind, start: int, view: memoryview) -> None:
    """Fill the view from byte `start` on of a tensor as torch sees it.

    Args:
        read: fills a buffer from some byte on of the tensor as it is stored.
        kind: how it is stored.
        start: the byte.
        view: the view.
    """
    if not kind.is_quantised:
        return read(start, view)
    size = kind.block * kind.dtype.itemsize
    done = 0
    while done < len(view):
        at = start + done
        first = at // size
        count = min(_PIECE // kind.block, -(-(start + len(view)) // size) - first)
        blocks = bytearray(count * kind.nbytes)
        read(first * kind.nbytes, memoryview(blocks))
        skipped = at - first * size
        values = byte_view(dequantised(kind, blocks))[skipped : skipped + len(view) - done]
        view[done : done + len(values)] = values
        done += len(values)
    return None


def quantised_8(values: Tensor) -> Tensor:
    """The bytes of floats as Q8_0: a multiple of 32 of them, 34 bytes for each 32.

    A block that holds inf or nan gives nan when it is read again.

    >>> quantised_8(torch.ones(32)).tolist()[:4]  # 1/127 in float16, then 127 for each value
    [8, 32, 127, 127]
    """
    blocks = values.reshape(-1, QUANTISED_8.block).to(torch.float32)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * torch.where(scale == 0, 0, 1 / scale)
    size = scaled.abs()
    whole = size.floor()
    whole = scaled.sign() * (whole + (2 * (size - whole)).floor())  # halves go away from zero
    numbers = torch.nan_to_num(whole, nan=0.0).to(torch.int8)
    return torch.cat([scale.to(torch.float16).view(torch.uint8), numbers.view(torch.uint8)], dim=1).reshape(-1)


@functools.cache
def _quantised(number: int) -> Kind:
    import gguf

    named = gguf.GGMLQuantizationType(number)
    block, nbytes = gguf.GGML_QUANT_SIZES[named]
    gguf.dequantize(np.zeros(nbytes, dtype=np.uint8), named)  # some that it knows by name it cannot read
    return Kind(number, named.name, block, nbytes, torch.float32)
