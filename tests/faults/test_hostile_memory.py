"""PyTorch checkpoints of few bytes that would take much memory, or very many reads."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.pytorch import pickle_machine
from tests.storage.support import read_bytes
from tests.storage.torch_files import archive, opened, read_all, saved

BUDGET = 4_000_000
MANY = 1_000_000
ONE = (
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x000((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00))\x89Ntq\x010h\x00h\x01Rq\x020"
)


def named(tensor: bytes, count: int) -> bytes:
    """A dict of that many tensors."""
    return ONE + b"}(" + b"".join(b"\x8c\x05%05x" % n + tensor for n in range(count)) + b"u"


SMALL_PUSHES = {
    "a list of None": b"](" + b"N" * MANY + b"e",
    "a list of None, one by one": b"]" + b"Na" * MANY,
    "a tuple of None": b"(" + b"N" * MANY + b"t",
    "small numbers": b"](" + b"K\x01" * MANY + b"e",
    "one entry of the memo": b"N\x940](" + b"h\x00" * MANY + b"e",
    "entries of the memo": b"N" + b"\x94" * MANY,
    "a text with one wide letter": b"X" + (MANY + 4).to_bytes(4, "little") + "\U0001f600".encode() + b"x" * MANY,
    "tensors over one storage": named(b"h\x00h\x01R", 9_000),
    "one tensor under many names": named(b"h\x02", 15_000),
}


@pytest.mark.parametrize("program", SMALL_PUSHES.values(), ids=SMALL_PUSHES)
def test_whatever_a_pickle_makes_is_charged(program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "BUDGET", BUDGET)
    raw = b"\x80\x04" + program + b"."
    data = archive({"x/data.pkl": raw, "x/data/0": bytes(4)})
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="would make objects of more than"):
            opened(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < BUDGET * 1.1 + 3 * len(raw) + 2**16  # the pickle as it is read, and a part of it


def test_the_directory_of_an_archive_is_charged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "BUDGET", BUDGET)
    members = {f"x/data/{n}": b"" for n in range(20_000)}
    with pytest.raises(FileFormatError, match="would make objects of more than"):
        opened(archive({"x/data.pkl": b"\x80\x04}.", **members}))


def test_many_elements_that_overlap_are_refused() -> None:
    with pytest.raises(FileFormatError, match="tensor 'w': its 2097152 elements overlap in 21001 places"):
        opened(saved({"w": torch.zeros(21_001, dtype=torch.uint8).as_strided((2,) * 21, (1000,) * 21)}))


def test_elements_that_overlap_within_little_or_are_few_are_read() -> None:
    numbers = torch.arange(30_000, dtype=torch.int32)
    model = {
        "windows": numbers.unfold(0, 3, 1),
        "near": numbers[:3000].as_strided((1500, 1500), (1, 1)),
        "repeated": numbers.view(300, 100).t()[:, :, None].expand(100, 300, 50),
    }
    read = read_all(saved(model), 2**24)
    for key, tensor in model.items():
        assert read[key] == tensor.contiguous().numpy().tobytes()
    assert read_bytes(opened(saved(model)), "windows") == read["windows"]
