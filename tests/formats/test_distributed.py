"""Folders of `torch.distributed.checkpoint`, written by it: tensors as a whole or in chunks along any dimension."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import sd_mecha
from sd_mecha.errors import FileFormatError, MechaError, ModelNotFoundError, UnknownFormatError
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.locations import LocalLocation
from sd_mecha.storage.pytorch.chunks import Chunk, check_cover
from sd_mecha.storage.pytorch.distributed import DcpReader
from tests.storage.support import ALL_DTYPES, entries_of, random_tensor, raw, read_bytes
from tests.storage.torch_files import MemorySource

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it warns of being used alone

Chunks = list[tuple[tuple[int, ...], tuple[int, ...]]]


class Sharded(torch.Tensor):
    """A tensor that tells the library to store it in chunks, as those of several processes do."""

    chunks: Chunks

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets), index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for index, (offsets, sizes) in enumerate(self.chunks)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        sizes = dict(self.chunks)[tuple(index.offset)]
        box = tuple(slice(start, start + size) for start, size in zip(index.offset, sizes, strict=True))
        return self.as_subclass(torch.Tensor)[box]


def grid(shape: tuple[int, ...], *cuts: list[int]) -> Chunks:
    """Chunks between the cuts of each dimension."""
    edges = [[0, *cut, size] for cut, size in itertools.zip_longest(cuts, shape, fillvalue=[])]
    ranges = [list(itertools.pairwise(edge)) for edge in edges]
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in itertools.product(*ranges)]


def sharded(tensor: torch.Tensor, chunks: Chunks) -> Sharded:
    found = tensor.as_subclass(Sharded)
    found.chunks = chunks
    return found


def save(path: Path, content: dict[str, Any], **options: Any) -> Path:
    dcp.save(content, storage_writer=dcp.FileSystemWriter(path, **options), no_dist=True)
    return path


def reader_of(path: Path) -> DcpReader:
    return DcpReader(LocalLocation(path))


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {str(dtype): random_tensor(dtype, (3, 4), seed) for seed, dtype in enumerate(ALL_DTYPES)}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "turned": random_tensor(torch.half, (4, 3)).t(),
    }
    reader = reader_of(save(tmp_path / "x", tensors))
    assert dict(reader.entries) == entries_of(tensors)
    assert all(read_bytes(reader, name) == raw(tensor) for name, tensor in tensors.items())
    reader.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_along_any_dimension_by_any_range(tmp_path: Path, threads: int) -> None:
    tensors = {name: random_tensor(torch.bfloat16, (7, 6, 5), seed) for seed, name in enumerate("abcd")}
    chunks = {
        "a": grid((7, 6, 5), [2, 3]),
        "b": grid((7, 6, 5), [], [], [1, 4]),
        "c": grid((7, 6, 5), [3], [2, 5], [4]),
        "d": [((0, 0, 0), (4, 6, 5)), ((4, 0, 0), (3, 2, 5)), ((4, 2, 0), (3, 4, 5))],
    }
    content = {name: sharded(tensor, chunks[name]) for name, tensor in tensors.items()}
    reader = reader_of(save(tmp_path / "x", content, thread_count=threads, single_file_per_rank=threads == 1))
    assert dict(reader.entries) == entries_of(tensors)
    for name, tensor in tensors.items():
        whole = raw(tensor)
        assert read_bytes(reader, name) == whole
        for start in range(0, len(whole), 11):
            for length in (1, 9, 130):
                part = bytearray(min(length, len(whole) - start))
                reader.read_into(name, start, memoryview(part))
                assert bytes(part) == whole[start : start + len(part)]
    reader.check_unchanged()
    reader.close()


def test_a_merge_of_folders_equals_that_of_tensors(tmp_path: Path) -> None:
    states = [{"w": random_tensor(torch.int8, (40, 30), seed).float(), "b": torch.ones(3) * seed} for seed in (1, 2)]
    for name, state in zip("ab", states, strict=True):
        content = dict(state)
        content["w"] = sharded(state["w"], grid((40, 30), [10, 20], [15]))
        save(tmp_path / name, {"model": content, "optim": {"state": {"w": {"exp_avg": torch.zeros(9)}}}, "step": 3})
    found, expected = (
        sd_mecha.merge(sd_mecha.n_average(*map(sd_mecha.model, models)), tqdm=None)
        for models in ([tmp_path / "a", tmp_path / "b"], states)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in ("w", "b"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "x", {"w": sharded(torch.ones(4, 4), grid((4, 4), [2], [2])), "b": torch.ones(3)})


def test_a_folder_without_metadata_is_no_model(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with pytest.raises(UnknownFormatError, match=r"without '\.metadata', .*fetch that too"):
        sd_mecha.merge(sd_mecha.model(folder))


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(ModelNotFoundError, match=r"__0_0\.distcp"):
        reader_of(folder)


def edited(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        assert old in data
        data = data.replace(old, new, 1)
        assert data[2:3] == b"\x95"  # the length of a frame follows
        return data[:3] + (len(data) - 11).to_bytes(8, "little") + data[11:]

    return edit


METADATA = {
    "a command": (
        edited(b"\x8c\x07pathlib\x94\x8c\tPosixPath", b"\x8c\x05posix\x94\x8c\x06system"),
        "can run programs",
    ),
    "a path out of the folder": (edited(b"__0_0.distcp", b"../../passwd"), "expected one within the folder itself"),
    "a file that is not there": (edited(b"__0_0.distcp", b"__0_9.distcp"), "was not found"),
    "truncated": (lambda data: data[:-40], "is truncated"),
    "another pickle": (lambda data: b"\x80\x02}.", "metadata.Metadata should be"),
    "another dtype": (edited(b"\x8c\x07float32", b"\x8c\x06double"), "float32.* there, but .*float64"),
    "a dtype that is none": (edited(b"\x8c\x07float32", b"\x8c\x04Size"), "which cannot be merged"),
    "a larger tensor": (edited(b"K\x04K\x04\x86", b"K\x04K\x05\x86"), "have 16 elements, expected 20"),
    "a smaller tensor": (edited(b"K\x04K\x04\x86", b"K\x04K\x03\x86"), "leaves its shape"),
    "other dimensions": (edited(b"K\x04K\x04\x86", b"K\x10\x85"), "a chunk has other dimensions"),
    "a negative size": (edited(b"K\x04K\x04\x86", b"J\xff\xff\xff\xffK\x03\x86"), "no shape or place"),
    "a length beyond the file": (edited(b"M)\x06", b"M\xff\xff"), "are not within the"),
    "no storage of a chunk": (edited(b"K\x02K\x02\x86", b"K\x02K\x01\x86"), "elements|listed but not stored"),
}


@pytest.mark.parametrize(("edit", "message"), METADATA.values(), ids=METADATA)
def test_metadata_that_breaks_a_rule_is_refused(folder: Path, edit: Callable[[bytes], bytes], message: str) -> None:
    path = folder / ".metadata"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(MechaError, match=message):
        sd_mecha.merge(sd_mecha.model(folder), tqdm=None)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([((0, 0), (3, 4)), ((2, 0), (1, 4))], "its chunks overlap"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 2)), ((2, 2), (2, 2))], "its chunks overlap"),
        ([((0, 0), (4, 4)), ((0, 0), (0, 4))], None),
        ([((0, 0), (3, 4))], "have 12 elements, expected 16"),
        ([((0, 0), (3, 4)), ((3, 0), (2, 4))], "leaves its shape"),
        ([], "have 0 elements"),
    ],
)
def test_chunks_must_make_up_their_tensor(chunks: Chunks, message: str | None) -> None:
    source = MemorySource(b"")
    made = [Chunk("w", source, 0, 0, TensorEntry(sizes, torch.float32), offsets) for offsets, sizes in chunks]
    if message is None:
        check_cover("here", "w", (4, 4), made, 0)
        return
    with pytest.raises(FileFormatError, match=message):
        check_cover("here", "w", (4, 4), made, 0)


def test_more_chunks_than_can_be_compared_are_refused() -> None:
    source, size = MemorySource(b""), 60
    made = [
        Chunk("w", source, 0, 0, TensorEntry((1, 1), torch.half), (row, column))
        for row in range(size)
        for column in range(size)
    ]
    with pytest.raises(FileFormatError, match="3600 chunks, too many to check"):
        check_cover("here", "w", (size, size), made, 0)


@pytest.mark.parametrize("length", range(0, 2000, 190))
def test_a_truncated_file_of_data_is_refused(folder: Path, length: int) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FileFormatError, match="are not within the"):
        reader_of(folder)


def test_damaged_data_is_refused_when_it_is_read(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    reader = reader_of(folder)
    for name in reader.entries:
        with pytest.raises(FileFormatError, match="its directory is broken"):
            read_bytes(reader, name)
