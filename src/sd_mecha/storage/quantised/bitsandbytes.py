"""Matrices that the bitsandbytes library quantised: read as the floats that they stand for.

In four bits (NF4 and FP4), as transformers, diffusers and Forge save them:

    X.weight                                 two values in each byte, the first one in the upper half
    X.weight.quant_map                       float32: the 16 values that a half byte may stand for
    X.weight.absmax                          float32: what each block of values is multiplied by; or uint8, and then
    X.weight.nested_absmax, nested_quant_map     those are quantised themselves, in blocks and by 256 values
    X.weight.quant_state.bitsandbytes__nf4   JSON: shape, dtype and sizes of blocks

In eight bits (LLM.int8):

    X.weight                                 int8
    X.SCB                                    float32: for each row, what 127 stands for
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.buffers import byte_view, fill
from sd_mecha.storage.contract import Reader, TensorEntry, check_range, flat_bytes
from sd_mecha.storage.strict_json import brief, parse_object
from sd_mecha.storage.views import ReaderView

_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SCALE_8, _ORDER_8 = "SCB", "weight_format"
_OF_127 = 7.874015718698502e-3  # what the library multiplies by; 1/127 is another float32
_MAX_STATE = 1 << 16
_MAX_ELEMENTS = 2**63 - 1

Values = Callable[[Reader, int, int], Tensor]
"""Gives the values of a matrix from one element to another, in the dtype that it is shown in."""


class DequantisedReader(ReaderView):
    """A model of quantised matrices as if they were floats.

    Args:
        reader: where the matrices are, and what goes with them.
        matrices: matrix -> its shape and dtype, and what gives its values; as `find_quantised` returns them.
    """

    def __init__(self, reader: Reader, matrices: Mapping[str, tuple[TensorEntry, Values]]) -> None:
        super().__init__(reader)
        self._matrices = dict(matrices)
        gone = {name + part for name in matrices for part in _PARTS}
        gone |= {name.removesuffix("weight") + part for name in matrices for part in (_SCALE_8, _ORDER_8)}
        self.entries: Mapping[str, TensorEntry] = {
            name: matrices[name][0] if name in matrices else entry
            for name, entry in reader.entries.items()
            if name not in gone and _STATE not in name
        }

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        if name not in self._matrices:
            return self._reader.read_into(name, start, buffer)
        entry, values = self._matrices[name]
        target = flat_bytes(buffer)
        check_range(name, start, len(target), entry.nbytes)
        fill(target, start, entry.dtype.itemsize, lambda first, last: values(self._reader, first, last))
        return None


def find_quantised(reader: Reader) -> dict[str, tuple[TensorEntry, Values]]:
    """The matrices of a model that bitsandbytes quantised; only what describes them is read.

    Raises:
        FileFormatError: what describes one is missing, or does not fit it.
    """
    found: dict[str, tuple[TensorEntry, Values]] = {}
    for key, entry in reader.entries.items():
        if _STATE in key:
            name = key.partition(_STATE)[0]
            found[name] = _four_bits(reader, name, key)
        elif entry.dtype == torch.int8 and key.endswith("weight"):
            module = key.removesuffix("weight")
            if module + _SCALE_8 in reader.entries:
                found[key] = _eight_bits(reader, key, module)
    return found


@dataclass(frozen=True, slots=True)
class _Scales:
    """What blocks of values are multiplied by."""

    stored: str
    block: int
    map: Tensor | None = None  # where they are quantised themselves
    factors: _Scales | None = None
    offset: float = 0.0

    def at(self, reader: Reader, first: int, last: int) -> Tensor:
        """Those of the values `first` to `last`, one for each."""
        begin, end = first // self.block, -(-last // self.block)
        scales = _read(reader, self.stored, begin, end)
        if self.map is not None and self.factors is not None:
            scales = self.map[scales.to(torch.int64)] * self.factors.at(reader, begin, end) + self.offset
        return scales[torch.arange(first, last) // self.block - begin]


def _four_bits(reader: Reader, name: str, key: str) -> tuple[TensorEntry, Values]:
    where = f"{reader.name}: {name!r} is quantised by bitsandbytes"
    state = _state(reader, key, where)
    shape, block = state.get("shape"), _block(state, "blocksize", where)
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        _fail(where, f"its shape is {brief(shape)}", "a list of whole numbers")
    if math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        _fail(where, f"its shape is {brief(shape)}", "one whose elements can be counted in 63 bits")
    dtype = _DTYPES.get(str(state.get("dtype")))
    if dtype is None:
        _fail(where, f"its dtype is {brief(state.get('dtype'))}", "one of " + ", ".join(_DTYPES))
    count = math.prod(shape)
    if name not in reader.entries or reader.entries[name].nbytes != -(-count // 2):
        got = reader.entries[name].nbytes if name in reader.entries else "no"
        _fail(where, f"there are {got} bytes for its shape {shape}", f"{-(-count // 2)}")
    code = _whole(reader, name + ".quant_map", 16, where)
    blocks = -(-count // block)
    stored = name + ".absmax"
    if stored in reader.entries and reader.entries[stored].dtype == torch.uint8:
        _check(reader, stored, blocks, torch.uint8, where)
        nested = _block(state, "nested_blocksize", where)
        _check(reader, name + ".nested_absmax", -(-blocks // nested), torch.float32, where)
        offset = state.get("nested_offset")
        if not isinstance(offset, int | float):
            _fail(where, f"its nested_offset is {brief(offset)}", "a number")
        factors = _Scales(name + ".nested_absmax", nested)
        scales = _Scales(stored, block, _whole(reader, name + ".nested_quant_map", 256, where), factors, float(offset))
    else:
        _check(reader, stored, blocks, torch.float32, where)
        scales = _Scales(stored, block)

    def values(source: Reader, first: int, last: int) -> Tensor:
        packed = torch.empty(-(-last // 2) - first // 2, dtype=torch.uint8)
        source.read_into(name, first // 2, byte_view(packed))
        halves = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
        halves = halves[first % 2 : first % 2 + last - first]
        return (code[halves.to(torch.int64)] * scales.at(source, first, last)).to(dtype)

    return TensorEntry(tuple(shape), dtype), values


def _eight_bits(reader: Reader, key: str, module: str) -> tuple[TensorEntry, Values]:
    where = f"{reader.name}: {key!r} is quantised by bitsandbytes"
    shape, scale, order = reader.entries[key].shape, module + _SCALE_8, module + _ORDER_8
    if len(shape) != 2:
        _fail(where, f"its shape is {shape}", "that of a matrix")
    _check(reader, scale, shape[0], torch.float32, where)
    if order in reader.entries:
        entry = reader.entries[order]
        numbers = torch.empty(entry.numel if entry.numel <= 1 else 0, dtype=entry.dtype)
        if numbers.numel():
            reader.read_into(order, 0, byte_view(numbers))
        if numbers.tolist() != [0]:
            _fail(where, f"its values are in the order {numbers.tolist()} of some GPUs", "0, that of rows; save it so")
    rows = _Scales(scale, shape[1])

    def values(source: Reader, first: int, last: int) -> Tensor:
        numbers = _read(source, key, first, last)
        return numbers.to(torch.float32) * rows.at(source, first, last) * _OF_127

    return TensorEntry(shape, torch.float32), values


def _state(reader: Reader, key: str, where: str) -> dict[str, Any]:
    entry = reader.entries[key]
    if entry.dtype != torch.uint8 or entry.numel > _MAX_STATE:
        _fail(where, f"{key!r} is {entry.dtype} of shape {entry.shape}", f"at most {_MAX_STATE} bytes of JSON")
    raw = torch.empty(entry.numel, dtype=torch.uint8)
    reader.read_into(key, 0, byte_view(raw))
    return parse_object(bytes(byte_view(raw)), f"{reader.name}: {key!r}")


def _block(state: Mapping[str, Any], key: str, where: str) -> int:
    size = state.get(key)
    if type(size) is not int or not 0 < size <= _MAX_ELEMENTS:
        _fail(where, f"its {key} is {brief(size)}", "a whole number, one or more")
    return size


def _check(reader: Reader, key: str, count: int, dtype: torch.dtype, where: str) -> None:
    entry = reader.entries.get(key)
    if entry is None or entry.numel != count or entry.dtype != dtype:
        got = "is missing" if entry is None else f"has {entry.numel} numbers of {entry.dtype}"
        _fail(where, f"{key!r} {got}", f"{count} of {dtype}")


def _whole(reader: Reader, key: str, count: int, where: str) -> Tensor:
    _check(reader, key, count, torch.float32, where)
    return _read(reader, key, 0, count)


def _read(reader: Reader, key: str, first: int, last: int) -> Tensor:
    dtype = reader.entries[key].dtype
    found = torch.empty(last - first, dtype=dtype)
    reader.read_into(key, first * dtype.itemsize, byte_view(found))
    return found


def _fail(where: str, got: str, expected: str) -> NoReturn:
    raise FileFormatError(f"{where}, but {got}; expected {expected}")
