"""Matrices kept as fp8 with a scale beside them: read as the float32 values that they stand for, and written so.

    X.weight         float8, the values divided by their scale
    X.scale_weight   float32: one scale, one for each row, or one for each square block of the matrix
    scaled_fp8       a marker that says what the file does

Other tools call the scale `weight_scale`, `weight_scale_inv`, `qscale_weight` or, in DeepSeek's files, `scale`; all of
them multiply. Scales of activations (`scale_input`, `input_scale` and so on) mean nothing without the fp8 values and go
with them.

Experts that transformers keeps in one tensor:

    Y                float8, of shape (experts, rows, columns)
    Y_scale_inv      one scale for each expert, or for each block of an expert's matrix (its fine-grained fp8)
    Y_scale          one for each column of an expert, in shape (experts, 1, columns) or (experts, columns, 1) (FBGEMM)
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.buffers import byte_view, fill
from sd_mecha.storage.contract import Reader, TensorEntry, Writer, check_range, flat_bytes, settle
from sd_mecha.storage.dtypes import FLOAT4, IS_STORAGE_ONLY, dtype_name
from sd_mecha.storage.views import ReaderView

MARKER = "scaled_fp8"
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "qscale_weight")
_SCALES_OF_EXPERTS = ("scale_inv", "scale")
_GOING_WITH = ("scale_input", "input_scale", "activation_scale", "qscale_act", "comfy_quant")
_OFTEN_PLAIN = re.compile(r"(?:emb|norm|head)[^.]*\.weight$")  # even where all other matrices have scales
_IN_A_BLOCK = re.compile(r"(?:^|\.)\d+\.(?:.*\.)?weight$")
_FP8 = torch.float8_e4m3fn
_POWERS: torch.dtype | None = getattr(torch, "float8_e8m0fnu", None)  # powers of two, made for scales


class ScaledReader(ReaderView):
    """A model of scaled fp8 matrices as if they were float32.

    Args:
        reader: where the matrices and their scales are.
        scales: matrix -> its scale, as `find_scales` returns them.
    """

    def __init__(self, reader: Reader, scales: Mapping[str, str]) -> None:
        super().__init__(reader)
        self._scale_names = dict(scales)
        self._scales: dict[str, Tensor] = {}
        modules = tuple(_module(name) for name in scales)
        gone = set(scales.values()) | {module + part for module in modules for part in _GOING_WITH}
        self.entries: Mapping[str, TensorEntry] = {
            name: TensorEntry(entry.shape, torch.float32) if name in scales else entry
            for name, entry in reader.entries.items()
            if name not in gone and name.rpartition(".")[2] != MARKER
        }

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        if name not in self._scale_names:
            return self._reader.read_into(name, start, buffer)
        target = flat_bytes(buffer)
        check_range(name, start, len(target), self.entries[name].nbytes)
        dtype = self._reader.entries[name].dtype

        def made(first: int, last: int) -> Tensor:
            values = torch.empty(last - first, dtype=dtype)
            self._reader.read_into(name, first, byte_view(values))
            return values.to(torch.float32) * self._factors(name, first, last)

        fill(target, start, 4, made)
        return None

    def _factors(self, name: str, first: int, last: int) -> Tensor:
        """What the elements `first` to `last` of a matrix are multiplied by."""
        scale = self._scale(name)
        if scale.numel() == 1:
            return scale.reshape(())
        element = torch.arange(first, last)
        index: list[Tensor] = []
        for size, count in zip(reversed(self.entries[name].shape), reversed(scale.shape), strict=True):
            index.insert(0, element % size // _block(size, count))
            element = element // size
        return scale[tuple(index)]

    def _scale(self, name: str) -> Tensor:
        if name not in self._scales:
            stored = self._scale_names[name]
            entry = self._reader.entries[stored]
            raw = torch.empty(entry.shape, dtype=entry.dtype)
            self._reader.read_into(stored, 0, byte_view(raw))
            scale = raw.to(torch.float32)
            if scale.dim() == 3 and stored == f"{name}_scale":
                scale = scale.reshape(len(scale), 1, -1)
            self._scales[name] = scale.reshape(-1, 1) if scale.dim() == 1 and scale.numel() > 1 else scale
        return self._scales[name]


def find_scales(entries: Mapping[str, TensorEntry], name: str) -> dict[str, str]:
    """The fp8 matrices of a model that have a scale: key of the matrix -> key of its scale.

    Raises:
        FileFormatError: a scale does not fit its matrix, or may be a parameter of its own.
    """
    found = _bare_scales(entries, name)
    for key, entry in entries.items():
        if not is_fp8(entry.dtype) or key in found:
            continue
        is_weight, module = key.endswith("weight"), _module(key)
        parts = _SCALES if is_weight else _SCALES_OF_EXPERTS
        scale = next((module + part for part in parts if module + part in entries), None)
        if scale is None:
            continue
        if is_weight:
            _check(name, key, entry.shape, scale, entries[scale])
        elif not _fits_experts(entry.shape, entries[scale], by_column=scale.endswith("_scale")):
            continue
        found[key] = scale
    return found


def _bare_scales(entries: Mapping[str, TensorEntry], name: str) -> dict[str, str]:
    """The matrices with what is called just `scale`: a parameter of its own, unless all matrices have one."""
    found, without = {}, []
    for key, entry in entries.items():
        if not (key.endswith("weight") and is_fp8(entry.dtype) and len(entry.shape) == 2):
            continue
        module = _module(key)
        if any(module + part in entries for part in _SCALES):
            continue
        scale = entries.get(f"{module}scale")
        if scale is not None and not is_fp8(scale.dtype) and scale.numel < entry.numel:
            found[key] = f"{module}scale"
        elif not _OFTEN_PLAIN.search(key):
            without.append(key)
    if len(found) < 2:
        return {}
    if without:
        key = min(found)
        raise FileFormatError(
            f"{name}: {found[key]!r} may be the scale of the fp8 matrix {key!r} or a parameter of its own: "
            f"{len(found)} matrices have one, and others, like {min(without)!r}, have none; use a file of floats"
        )
    for key, scale_name in found.items():
        _check(name, key, entries[key].shape, scale_name, entries[scale_name])
    return found


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether it is one of the fp8 dtypes that matrices are kept in."""
    return dtype in IS_STORAGE_ONLY and dtype.itemsize == 1 and dtype not in (_POWERS, FLOAT4)


def _is_scale(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and not is_fp8(dtype)


def _module(key: str) -> str:
    """What the names of a matrix and of all that goes with it begin with."""
    return key.removesuffix("weight") if key.endswith("weight") else f"{key}_"


def _block(size: int, count: int) -> int:
    """How long the blocks are that `count` scales stand for along a dimension; the last one may be shorter.

    Blocks are powers of two, where one fits: 576 rows with 5 scales have blocks of 128, not of 116.

    >>> _block(576, 5), _block(1024, 8), _block(960, 5), _block(7, 1), _block(3, 3)
    (128, 128, 192, 7, 1)
    """
    if count in (1, size):
        return size // count
    power = 1 << (-(-size // count) - 1).bit_length()  # the least one that is no shorter than equal parts
    return power if -(-size // power) == count else -(-size // count)


def _divides(size: int, count: int) -> bool:
    """Whether that many scales can stand for blocks of equal length."""
    return size == count or (0 < count <= size and -(-size // _block(size, count)) == count)


def _check(name: str, key: str, shape: tuple[int, ...], scale: str, entry: TensorEntry) -> None:
    rows_only = entry.shape == shape[:1] or entry.shape == (*shape[:1], 1)
    blocks = len(shape) == 2 and len(entry.shape) == 2 and all(map(_divides, shape, entry.shape))
    plain = entry.numel == 1 or (len(shape) == 2 and (rows_only or blocks))
    if not plain or not _is_scale(entry.dtype):
        raise FileFormatError(
            f"{name}: scale {scale!r} of shape {entry.shape} ({dtype_name(entry.dtype)}) does not fit the fp8 matrix "
            f"{key!r} of shape {shape}; expected one float, one for each row, or one for each block"
        )


def _fits_experts(shape: tuple[int, ...], scale: TensorEntry, *, by_column: bool) -> bool:
    """Whether scales can be meant in one way only; blocks that do not fill a matrix can be in two."""
    if not len(shape) == len(scale.shape) == 3 or shape[0] != scale.shape[0] or not _is_scale(scale.dtype):
        return False
    (rows, columns), counts = shape[1:], scale.shape[1:]
    if by_column:
        return counts in ((1, 1), (1, columns)) or (counts == (columns, 1) and rows != columns)
    sizes = zip(shape[1:], counts, strict=True)
    return all(size == count or (0 < count <= size and _block(size, count) * count == size) for size, count in sizes)


class ScaledWriter:
    """Writes the matrices of numbered blocks as fp8 with a scale; a matrix is put together before it is written.

    Args:
        writer: where they go.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._entries: dict[str, TensorEntry] = {}
        self._matrices: dict[str, Tensor] = {}
        self._left: dict[str, int] = {}

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        declared: dict[str, TensorEntry] = {}
        for name, entry in entries.items():
            if (
                len(entry.shape) == 2
                and entry.numel
                and entry.dtype.is_floating_point
                and _IN_A_BLOCK.search(name)
                and _scale_of(name) not in entries  # a name that the model needs itself
            ):
                self._entries[name] = entry
                declared[name] = TensorEntry(entry.shape, _FP8)
                declared[_scale_of(name)] = TensorEntry((1,), torch.float32)
            else:
                declared[name] = entry
        if self._entries:
            declared.setdefault(MARKER, TensorEntry((0,), _FP8))
        self._writer.declare(declared, metadata)

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        entry = self._entries.get(name)
        if entry is None:
            return self._writer.write(name, start, buffer)
        part = flat_bytes(buffer)
        with self._lock:
            if name not in self._matrices:
                self._matrices[name] = torch.empty(entry.shape, dtype=entry.dtype)
                self._left[name] = entry.nbytes
            matrix = self._matrices[name]
        byte_view(matrix)[start : start + len(part)] = part
        with self._lock:
            self._left[name] -= len(part)
            if self._left[name]:
                return None
            del self._matrices[name]
        values, scale = quantized(matrix)
        self._writer.write(name, 0, byte_view(values))
        self._writer.write(_scale_of(name), 0, byte_view(scale))
        return None

    def drop(self, name: str) -> None:
        self._writer.drop(name)
        if name in self._entries:
            self._writer.drop(_scale_of(name))
            with self._lock:
                self._matrices.pop(name, None)
                self._left.pop(name, None)

    @property
    def completed(self) -> Set[str]:
        """What an earlier run finished."""
        found: Set[str] = getattr(self._writer, "completed", frozenset())
        return {name for name in found if name not in self._entries or _scale_of(name) in found}

    def finished(self, name: str) -> None:
        tell = getattr(self._writer, "finished", lambda name: None)
        tell(name)
        if name in self._entries:
            tell(_scale_of(name))

    def settle(self) -> None:
        settle(self._writer)

    def commit(self) -> None:
        self._writer.commit()

    def abort(self) -> None:
        self._matrices.clear()
        self._writer.abort()


def quantized(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as fp8 and the scale, of shape (1,), that gives it back; the largest value uses the whole range.

    >>> values, scale = quantized(torch.tensor([[0.5, -2.0]]))
    >>> (values.to(torch.float32) * scale).tolist()
    [[0.5, -2.0]]
    """
    wide = matrix.to(torch.float32)
    finite = wide.abs().nan_to_num(0.0, 0.0)
    largest = finite.max() if wide.numel() else torch.tensor(0.0)
    scale = (largest / torch.finfo(_FP8).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scale if largest > 0 else wide).to(_FP8), (scale if largest > 0 else torch.tensor(1.0)).reshape(1)


def _scale_of(name: str) -> str:
    return name.removesuffix("weight") + "scale_weight"
