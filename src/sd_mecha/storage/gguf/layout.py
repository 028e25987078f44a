"""The header of a GGUF file that is written: keys taken over from another file, keys of our own, and places."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

import torch

from sd_mecha.storage.contract import ByteSource
from sd_mecha.storage.gguf.cursor import ARRAY, CHECKSUMS, RECIPE, STRING, WRITTEN
from sd_mecha.storage.gguf.header import ALIGNMENT, MAGIC, ORIGINAL_SHAPE, VERSION, read_keys
from sd_mecha.storage.gguf.kinds import PLAIN, QUANTISED_8, Kind
from sd_mecha.storage.placed_writer import Layout

OUR_NAMES = {"mecha_recipe": RECIPE, "mecha_checksums": CHECKSUMS}
"""What we call things in the metadata of other formats -> the key that has them here."""
_UINT32, _INT32 = 4, 5
_MAX_SIZES = 4
_QUANTISATION = 2  # version of how blocks are laid out
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # what llama.cpp calls files of mostly that kind
_OWN = ("general.alignment", "general.file_type", "general.quantization_version", *OUR_NAMES.values(), WRITTEN)
_OWN_STARTS = ("split.", ORIGINAL_SHAPE)
_OF_TORCH = "format"  # says that tensors are PyTorch's, where that is a question


def taken_over(source: ByteSource) -> dict[str, bytes]:
    """The keys of a file, with their values, as they are written there: architecture, tokenizer and the like.

    Raises:
        FileFormatError: it is no GGUF file, or a damaged one.
    """
    places = read_keys(source).places
    return {key: source.read(offset, length) for key, (offset, length) in places.items() if not _is_own(key)}


def key_values(
    others: Mapping[str, bytes],
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[tuple[int, ...], Kind]],
    written: str,
) -> list[bytes]:
    """All keys of a file, in the order that they are written in.

    Args:
        others: those of another file.
        metadata: what the model says of itself; what the other file says goes first.
        tensors: shapes and kinds.
        written: the dtypes of the floats before they take the form in which they are stored.

    Raises:
        UnicodeEncodeError: a text is not valid Unicode.
    """
    pairs = dict(others)
    for key, text in metadata.items():
        name = OUR_NAMES.get(key, key)
        if (key in OUR_NAMES or not _is_own(name)) and name != _OF_TORCH:
            pairs.setdefault(name, _pair(name, STRING, _text(text)))
    pairs[WRITTEN] = _pair(WRITTEN, STRING, _text(written))
    size_of: dict[str, int] = {}
    for shape, kind in tensors.values():
        if kind.name in _FILE_TYPES:
            size_of[kind.name] = size_of.get(kind.name, 0) + math.prod(shape)
    if size_of:
        number = _FILE_TYPES[max(size_of, key=lambda name: size_of[name])]
        pairs["general.file_type"] = _pair("general.file_type", _UINT32, struct.pack("<I", number))
    if QUANTISED_8.name in size_of:
        key = "general.quantization_version"
        pairs[key] = _pair(key, _UINT32, struct.pack("<I", _QUANTISATION))
    for name, (shape, _) in tensors.items():
        if len(shape) > _MAX_SIZES:
            key = ORIGINAL_SHAPE + name
            value = struct.pack(f"<IQ{len(shape)}i", _INT32, len(shape), *shape)
            pairs[key] = _pair(key, ARRAY, value)
    return list(pairs.values())


def build_layout(pairs: list[bytes], tensors: Mapping[str, tuple[tuple[int, ...], Kind]]) -> Layout:
    """The header with its padding, the place of each tensor in the file, and the size of all, padded too.

    Raises:
        UnicodeEncodeError: a name is not valid Unicode.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(pairs)), *pairs]
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name, (shape, kind) in tensors.items():
        sizes = _few_sizes(shape)[::-1]
        parts += [_text(name), struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind.number, end)]
        nbytes = math.prod(shape) // kind.block * kind.nbytes
        offsets[name] = end, nbytes
        end = _round_up(end + nbytes)
    raw = b"".join(parts)
    header = raw.ljust(_round_up(len(raw)), b"\0")
    places = {name: (len(header) + offset, nbytes) for name, (offset, nbytes) in offsets.items()}
    return Layout(header, places, len(header) + end)


def kind_for(shape: tuple[int, ...], dtype: torch.dtype, *, quantised: bool) -> Kind | None:
    """How a tensor is stored; None if the format cannot hold its dtype, or other programs would not read it.

    What has fewer than two dimensions is float32, as every program that reads such files expects of norms and biases.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        quantised: whether matrices become Q8_0, where their rows are multiples of its blocks.
    """
    kind = PLAIN.get(dtype)
    if kind is None or dtype == torch.float64 or not dtype.is_floating_point:
        return None if dtype == torch.float64 else kind
    if len(shape) < 2:
        return PLAIN[torch.float32]
    return QUANTISED_8 if quantised and shape[-1] % QUANTISED_8.block == 0 else kind


def _is_own(key: str) -> bool:
    return key in _OWN or key.startswith(_OWN_STARTS)


def _few_sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of at most four sizes; the first ones are put together."""
    extra = max(len(shape) - _MAX_SIZES, 0)
    return (math.prod(shape[: extra + 1]), *shape[extra + 1 :]) if extra else shape


def _pair(key: str, kind: int, value: bytes) -> bytes:
    return b"".join([_text(key), struct.pack("<I", kind), value])


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
