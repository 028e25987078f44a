"""Making safetensors files byte by byte, reading back whole tensors, and comparing them bit by bit."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch

from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.dtypes import TO_SAFETENSORS


def file_bytes(header: Any, data: bytes = b"", *, padding: bytes = b"") -> bytes:
    """A safetensors file with that header (bytes, or anything that JSON can write), right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += padding
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of any tensor, row-major."""
    return bytes(byte_view(tensor.resolve_conj().contiguous()))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits (NaN included); bool stays 0 or 1."""
    size = TensorEntry(shape, dtype).nbytes
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    tensor = torch.empty(shape, dtype=dtype)
    noise = torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator)
    byte_view(tensor)[:] = byte_view(noise)
    return tensor


def read_bytes(reader: Reader, name: str) -> bytes:
    data = bytearray(reader.entries[name].nbytes)
    reader.read_into(name, 0, memoryview(data))
    return bytes(data)


def entries_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


ALL_DTYPES = sorted(TO_SAFETENSORS, key=str)
