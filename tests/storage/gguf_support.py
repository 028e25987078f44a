"""Making GGUF files: right ones with the gguf package, and any at all byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sd_mecha.storage.files import RangeFile
from sd_mecha.storage.gguf.reader import GgufReader

WRITABLE_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")
"""What the gguf package can quantise to, and read."""
ALL_KINDS = (
    *WRITABLE_KINDS,
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"),
    *("IQ3_S", "IQ4_NL", "IQ4_XS"),
)
"""What it can read."""


def write_gguf(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    kinds: Mapping[str, str] | None = None,
    *,
    arch: str = "flux",
    keys: Mapping[str, Any] | None = None,
) -> Path:
    """A file of those tensors, made by the gguf package; `kinds` names what some are quantised as."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for key, value in (keys or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, "BF16" if tensor.dtype == torch.bfloat16 else None)
        if kind is None:
            writer.add_tensor(name, tensor.numpy())
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path: Path) -> GgufReader:
    return GgufReader(RangeFile(path))


def read_range(reader: GgufReader, name: str, start: int = 0, end: int | None = None) -> bytes:
    data = bytearray((reader.entries[name].nbytes if end is None else end) - start)
    reader.read_into(name, start, memoryview(data))
    return bytes(data)


def read_tensor(reader: GgufReader, name: str) -> torch.Tensor:
    entry = reader.entries[name]
    data = bytearray(read_range(reader, name))
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape) if data else torch.empty(entry.shape)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, sizes: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = list(sizes)
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_of(
    pairs: Iterable[bytes] = (),
    infos: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
) -> bytes:
    """A file of those parts, right or wrong; `counts` are those of tensors and keys where they should lie."""
    pairs, infos = list(pairs), list(infos)
    tensors = len(infos) if counts[0] is None else counts[0]
    keys = len(pairs) if counts[1] is None else counts[1]
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def same_bits(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Equal, nan included."""
    return bool(np.array_equal(found.numpy().view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)))
