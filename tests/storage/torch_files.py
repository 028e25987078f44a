"""Making PyTorch checkpoints, right and wrong, and reading them from memory."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from sd_mecha.errors import ChangedInputError
from sd_mecha.storage.pytorch.reader import TorchReader
from tests.storage.support import random_tensor, read_bytes

_MAGIC = 0x1950A86A20F9469CFC6C


class MemorySource:
    """Bytes as a file that is read by range."""

    def __init__(self, data: bytes, name: str = "memory.pt") -> None:
        self.data = data
        self.name = name
        self.size = len(data)
        self.fingerprint = name
        self.reads: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, buffer.nbytes))
        if offset < 0 or offset + buffer.nbytes > self.size:
            raise ChangedInputError(f"{self.name}: read beyond the end")
        buffer.cast("B")[:] = self.data[offset : offset + buffer.nbytes]

    def read(self, offset: int, length: int) -> bytes:
        if length > self.size:
            raise ChangedInputError(f"{self.name}: read beyond the end")
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        pass


def saved(value: Any, new: bool = True, **options: Any) -> bytes:
    """What `torch.save` makes of a value."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=new, **options)
    return file.getvalue()


def opened(data: bytes) -> TorchReader:
    return TorchReader(MemorySource(data))


def read_all(data: bytes, most: int = 1 << 20) -> dict[str, bytes]:
    """All tensors of a file, except for those beyond `most` bytes."""
    reader = opened(data)
    return {name: read_bytes(reader, name) for name, entry in reader.entries.items() if entry.nbytes <= most}


def archive(members: dict[str, bytes], **options: Any) -> bytes:
    """A zip archive that Python writes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return file.getvalue()


def with_pickle(raw: bytes) -> bytes:
    """An archive as torch.save writes it, with that pickle."""
    return archive({"archive/data.pkl": raw, "archive/byteorder": b"little", "archive/version": b"3\n"})


def legacy_with_pickle(raw: bytes) -> bytes:
    """The kind of file before that, with that pickle."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(pickle.dumps(v, 2) for v in (_MAGIC, 1001, info)) + raw + pickle.dumps([], 2)


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        return {name: found.read(name) for name in found.namelist()}


def small_model() -> dict[str, torch.Tensor]:
    """A few tensors of every layout, two of which share their memory."""
    base = random_tensor(torch.float32, (6, 5), 1)
    return {
        "plain": base,
        "tied": base,
        "turned": base.t(),
        "cut": base[1:5:2, 1:4],
        "half": random_tensor(torch.bfloat16, (7,), 2),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "repeated": torch.tensor([[1.0], [2.0]]).expand(2, 3),
    }


def write(path: Path, value: Any, new: bool = True) -> Path:
    path.write_bytes(saved(value, new))
    return path
