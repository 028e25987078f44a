"""Folders of `torch.distributed.checkpoint` made to do harm, or that contradict themselves."""

from __future__ import annotations

import pickle
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.locations import LocalLocation
from sd_mecha.storage.pytorch import pickle_machine
from sd_mecha.storage.pytorch.distributed import DcpReader
from tests.storage.support import read_bytes
from tests.storage.torch_files import archive, members_of, saved

DATA = "__0_0.distcp"
Numbers = tuple[int, ...]


def properties() -> TensorProperties:
    return TensorProperties(dtype=torch.float32)


def chunk(offsets: Numbers, sizes: Numbers) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def tensor(shape: Numbers, chunks: list[ChunkStorageMetadata]) -> TensorStorageMetadata:
    return TensorStorageMetadata(properties(), torch.Size(shape), chunks)


def write(folder: Path, tensors: dict[str, Any], storages: Any, data: bytes, paths: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / DATA).write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, paths, storages)))
    return folder


def row(folder: Path, pieces: Sequence[bytes], places: Sequence[tuple[int, int]] | None = None) -> Path:
    """A folder with a tensor `w`, one element of which lies in each of those pieces of a file."""
    if places is None:
        ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
        places = [(end - len(piece), len(piece)) for end, piece in zip(ends, pieces, strict=True)]
    storages = {
        MetadataIndex("w", torch.Size((i,))): _StorageInfo(DATA, begin, length)
        for i, (begin, length) in enumerate(places)
    }
    chunks = [chunk((i,), (1,)) for i in range(len(places))]
    return write(folder, {"w": tensor((len(places),), chunks)}, storages, b"".join(pieces))


def opened(folder: Path) -> DcpReader:
    return DcpReader(LocalLocation(folder))


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        opened(folder)


ONE = saved(torch.ones(1))


def test_chunks_side_by_side_are_read(tmp_path: Path) -> None:
    reader = opened(row(tmp_path / "x", [saved(torch.tensor([value])) for value in (1.0, 2.0, 3.0)]))
    assert torch.frombuffer(bytearray(read_bytes(reader, "w")), dtype=torch.float32).tolist() == [1, 2, 3]


@pytest.mark.parametrize("second", [0, 1, len(ONE) - 1], ids=["same bytes", "next byte", "last byte"])
def test_chunks_that_share_bytes_are_refused(tmp_path: Path, second: int) -> None:
    places = [(second, len(ONE)), (0, len(ONE))]
    refuses(row(tmp_path / "x", [ONE, ONE], places), "'w' and 'w' share bytes")


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    names = ("a", "b")
    storages = {MetadataIndex(name, torch.Size((0,))): _StorageInfo(DATA, 0, len(ONE)) for name in names}
    tensors = {name: tensor((1,), [chunk((0,), (1,))]) for name in names}
    refuses(write(tmp_path / "x", tensors, storages, ONE), "'a' and 'b' share bytes")


def test_a_chunk_longer_than_its_bytes_is_refused_when_the_folder_is_opened(tmp_path: Path) -> None:
    storages = {MetadataIndex("w", torch.Size((0,))): _StorageInfo(DATA, 0, len(ONE))}
    folder = write(tmp_path / "x", {"w": tensor((2**40,), [chunk((0,), (2**40,))])}, storages, ONE)
    refuses(folder, f"{2**42} bytes cannot lie in {len(ONE)} bytes")


def test_a_chunk_listed_twice_is_refused(tmp_path: Path) -> None:
    storages = {MetadataIndex("w", torch.Size((0,))): _StorageInfo(DATA, 0, len(ONE))}
    folder = write(tmp_path / "x", {"w": tensor((2,), [chunk((0,), (1,))] * 2)}, storages, ONE)
    refuses(folder, "listed twice")


def test_tensors_that_share_a_long_list_of_empty_chunks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle_machine, "BUDGET", 2**23)
    shared = tensor((0,), [chunk((0,), (0,))] * 2_000)
    refuses(write(tmp_path / "x", {str(i): shared for i in range(100)}, {}, b""), "would make objects of more than")


def test_paths_of_many_levels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "BUDGET", 2**23)
    empty = tensor((0,), [])
    names = [str(i) for i in range(4_000)]
    paths = {name: (name, *"x" * 30) for name in names}
    folder = write(tmp_path / "x", dict.fromkeys(names, empty), {}, b"", paths)
    refuses(folder, "would make objects of more than")


def colliding(count: int) -> list[Numbers]:
    """Pairs of numbers with the same hash, whatever the hashes of texts are seeded with."""
    first, second, start, full = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64
    inverse, found, number = pow(second, -1, full), [], 0
    while len(found) < count:
        number += 1
        lane = (start + number * second) % full
        other = (12345 - ((lane << 31 | lane >> 33) % full) * first) * inverse % full
        if other < 2**60:
            found.append((number, other))
    return found


class Pairs:
    """A dict in a pickle that was none before."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs

    def __reduce__(self) -> Any:
        return OrderedDict, (self.pairs,)


def test_places_whose_hashes_are_all_the_same_are_not_compared_with_each_other(tmp_path: Path) -> None:
    places = colliding(40_000)
    assert len(set(map(hash, places))) == 1
    info = _StorageInfo(DATA, 0, len(ONE))
    storages = Pairs([(MetadataIndex("w", place), info) for place in places])  # type: ignore[arg-type]
    folder = write(tmp_path / "x", {"w": tensor((1,), [])}, storages, ONE)
    start = time.process_time()
    refuses(folder, "have 0 elements")
    assert time.process_time() - start < 10  # 30 and more if they were


@pytest.mark.parametrize("part", ["pickle", "directory"])
def test_a_chunk_with_more_in_it_than_a_tensor_is_refused(tmp_path: Path, part: str) -> None:
    if part == "pickle":
        data = saved((torch.ones(1), "x" * 2**17))
    else:
        extra = {f"archive/{i:05}" + "x" * 200: b"" for i in range(400)}
        data = archive({**members_of(ONE), **extra})
    reader = opened(row(tmp_path / "x", [data]))
    with pytest.raises(FileFormatError, match="expected at most"):
        read_bytes(reader, "w")


def test_the_directories_of_chunks_are_not_kept(tmp_path: Path) -> None:
    extra = {f"archive/{i:05}": b"" for i in range(300)}
    piece = archive({**members_of(ONE), **extra})
    count = 60
    reader = opened(row(tmp_path / "x", [piece] * count))
    tracemalloc.start()
    try:
        data = read_bytes(reader, "w")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data) == 4 * count
    assert kept < count * 4_000  # a directory of 300 members takes a hundred thousand


CLASHES = {
    "below a tensor": {"a": ("a",), "b": ("a", "b")},
    "above a tensor": {"b": ("a", "b"), "a": ("a",)},
    "deep below a tensor": {"a": ("model", "a"), "b": ("model", "a", "x", "y")},
    "at the same place": {"a": ("model", "w"), "b": ("model", "w")},
    "where another one has no path": {"b": ("a",), "a": None},
}


@pytest.mark.parametrize("paths", CLASHES.values(), ids=CLASHES)
def test_two_tensors_of_which_one_would_be_lost_are_refused(tmp_path: Path, paths: dict[str, Any]) -> None:
    tensors = dict.fromkeys(paths, tensor((0,), []))
    refuses(write(tmp_path / "x", tensors, {}, b"", paths), "tensor '[ab]' lies (within|where)")
