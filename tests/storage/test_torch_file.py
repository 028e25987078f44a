from __future__ import annotations

import argparse
import collections
import io
import pathlib
import random
import sys
import types

import numpy as np
import pytest
import torch

from sd_mecha.errors import FileFormatError, MechaError
from sd_mecha.storage.contract import Reader, Tracked
from sd_mecha.storage.files import RangeFile
from sd_mecha.storage.pytorch.reader import TorchReader
from tests.storage.support import ALL_DTYPES, entries_of, random_tensor, raw, read_bytes
from tests.storage.torch_files import (
    MemorySource,
    archive,
    members_of,
    opened,
    read_all,
    saved,
    small_model,
    write,
)

KINDS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def expected(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: raw(tensor.detach().resolve_conj().resolve_neg()) for name, tensor in tensors.items()}


@KINDS
def test_every_dtype(new):
    tensors = {str(dtype): random_tensor(dtype, (3, 4), seed) for seed, dtype in enumerate(ALL_DTYPES)}
    data = saved(tensors, new)
    assert dict(opened(data).entries) == entries_of(tensors)
    assert read_all(data) == expected(tensors)


@KINDS
def test_every_layout_by_any_range(new):
    tensors = small_model()
    tensors["parameter"] = torch.nn.Parameter(tensors["plain"][2:])
    tensors["conjugate"] = torch.randn(3, 4, dtype=torch.complex64).conj()
    tensors["negative"] = torch.randn(3, 4, dtype=torch.complex64).conj().imag
    tensors["deep"] = random_tensor(torch.int16, (3, 4, 5, 2), 4).permute(2, 0, 3, 1)
    reader = opened(saved(tensors, new))
    assert dict(reader.entries) == entries_of(tensors)
    for name, content in expected(tensors).items():
        assert read_bytes(reader, name) == content
        for start in range(0, len(content), 3):
            for length in (1, 7, 64):
                part = bytearray(min(length, len(content) - start))
                reader.read_into(name, start, memoryview(part))
                assert bytes(part) == content[start : start + len(part)]
        with pytest.raises(ValueError, match="outside tensor"):
            reader.read_into(name, len(content), memoryview(bytearray(1)))


@KINDS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickles(new, protocol):
    tensors = small_model()
    assert read_all(saved(tensors, new, pickle_protocol=protocol)) == expected(tensors)


@KINDS
def test_it_satisfies_the_contract(tmp_path, new):
    reader = TorchReader(RangeFile(write(tmp_path / "x.pt", small_model(), new)))
    assert isinstance(reader, Reader)
    assert isinstance(reader, Tracked)
    assert reader.name == str(tmp_path / "x.pt")
    assert str(tmp_path) in reader.fingerprint
    reader.check_unchanged()
    reader.close()


@KINDS
def test_a_large_turned_matrix_is_collected_in_pieces_that_fit_what_is_wanted(new):
    matrix = random_tensor(torch.float32, (3000, 700), 1)
    source = MemorySource(saved({"w": matrix.t()}, new))
    reader = TorchReader(source)
    source.reads.clear()
    part = bytearray(3 * 3000 * 4)
    reader.read_into("w", 5 * 3000 * 4, memoryview(part))
    assert bytes(part) == raw(matrix.t()[5:8])
    assert max(length for _, length in source.reads) <= 1 << 20


@KINDS
def test_opening_reads_no_data(new):
    source = MemorySource(saved({f"k{i}": torch.zeros(1 << 16) for i in range(40)}, new))
    TorchReader(source)
    assert sum(length for _, length in source.reads) < (1 << 21) < source.size


@KINDS
def test_a_pickle_longer_than_the_first_window(new):
    tensors = {"x" * 1000 + str(i): torch.tensor(float(i)) for i in range(1500)}
    assert read_all(saved(tensors, new)) == expected(tensors)


def test_entries_follow_their_data():
    tensors = {f"k{i:02}": torch.full((3,), float(i)) for i in range(30)}
    data = saved(tensors, False)  # here, storages are sorted by their addresses in memory
    places = [data.index(content) for content in (raw(tensors[name]) for name in opened(data).entries)]
    assert places == sorted(places)


def test_a_file_of_the_other_byte_order():
    tensors = {"f": torch.tensor([1.5, -2.0]), "c": torch.tensor([1 + 2j]), "b": torch.tensor([True, False])}
    members = members_of(saved(tensors))
    (folder,) = {name.partition("/")[0] for name in members}
    members[f"{folder}/byteorder"] = b"big"
    for key, kind in (("0", "f4"), ("1", "f4"), ("2", "u1")):
        name = f"{folder}/data/{key}"
        members[name] = np.frombuffer(members[name], kind).byteswap().tobytes()
    assert read_all(archive(members)) == expected(tensors)
    members[f"{folder}/byteorder"] = b"middle"
    with pytest.raises(FileFormatError, match="byte order is b'middle'"):
        opened(archive(members))


def test_a_legacy_file_of_another_machine():
    """What the file says of the machine that wrote it is not about its numbers, for torch.load neither."""
    tensors = {"f": torch.tensor([1.5, -2.0])}
    data = saved(tensors, False).replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    assert torch.equal(torch.load(io.BytesIO(data))["f"], tensors["f"])
    assert read_all(data) == expected(tensors)


# --- what is taken ---------------------------------------------------------------------------------------------------


W = {"w": torch.ones(2), "epoch": 3}


@pytest.mark.parametrize(
    "content",
    [
        W,
        {"state_dict": W},
        {"model": W, "optimizer": {"state": {0: torch.zeros(9)}}, "loss": torch.zeros(1)},
        {"module": W, "ema": {"w": torch.zeros(2)}},
        {"params": {"w": torch.zeros(2)}, "params_ema": W},
        {"ema": W},
        {"model": {"state_dict": {"module": W}}},
        {"model": {"config": 1}, "net": W},
        {"model": torch.nn.Linear(1, 1).state_dict()._metadata, "w": torch.ones(2)},
        collections.defaultdict(list, W),
        collections.OrderedDict(W),
    ],
    ids=str,
)
def test_the_model_is_found_in_its_wrappers(content):
    assert read_all(saved(content)) == {"w": raw(torch.ones(2))}


def test_a_state_dict_with_its_attributes():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert read_all(saved(module.state_dict())) == expected(module.state_dict())


def test_a_dict_that_holds_itself_ends():
    content = {"model": {}}
    content["model"]["model"] = content
    with pytest.raises(FileFormatError, match="holds no dict of tensors"):
        opened(saved(content))
    content["w"] = torch.ones(2)
    assert read_all(saved(content)) == {"w": raw(torch.ones(2))}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1, "lr": 2}, "holds no dict of tensors.*its keys are: 'a', 'lr'"),
        ({}, r"its keys are: \(none\)"),
        (torch.ones(1), "holds a single tensor"),
        ([torch.ones(1)], "expected a dict of tensors"),
        ({3: torch.ones(1)}, "a tensor has the key 3; expected text"),
        ({"s": torch.eye(2).to_sparse()}, "tensor 's': it is sparse"),
        ({"m": torch.ones(2, device="meta")}, "tensor 'm': it is on the device 'meta'"),
        ({"c": torch.ones(1, dtype=torch.complex128)}, "tensor 'c': its dtype complex128 cannot be merged"),
    ],
)
@KINDS
def test_what_is_no_model_is_refused(content, message, new):
    with pytest.raises(FileFormatError, match=message):
        opened(saved(content, new))


def test_what_trainers_leave_beside_the_model_is_not_imported(monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.made_up")
    exec("class Mode:\n    def __init__(self):\n        self.x = {1: 2}", module.__dict__)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    data = saved(
        {
            "state_dict": {"w": torch.ones(2)},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0), "sparse": torch.eye(2).to_sparse()}}}],
            "callbacks": {module.Mode: {"best": np.float64(0.5), "when": {1, 2}}, ("a", 1): frozenset([3])},
            "hyper_parameters": argparse.Namespace(
                path=pathlib.PurePosixPath("/x"), lr=[1e-3], device=torch.device("cpu")
            ),
            "random": (np.random.RandomState(0).get_state(), 2**500, b"\xff", bytearray(b"x"), 1j, slice(3), range(2)),
            "mode": module.Mode(),
            "counts": collections.Counter("aab"),
            "queue": collections.deque([1], 3),
        },
        pickle_protocol=4,
    )
    monkeypatch.delitem(sys.modules, module.__name__)
    assert read_all(data) == {"w": raw(torch.ones(2))}
    assert module.__name__ not in sys.modules


class _Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)


@KINDS
@pytest.mark.parametrize("make", [_Whole, lambda: torch.nn.Linear(1, 1)], ids=["own class", "class of torch"])
def test_a_module_saved_whole_is_refused(new, make, monkeypatch):
    monkeypatch.setitem(sys.modules, _Whole.__module__, sys.modules[__name__])
    with pytest.raises(FileFormatError, match=r"a module saved whole.*save module\.state_dict\(\)"):
        opened(saved({"model": make()}, new))


# --- damage ----------------------------------------------------------------------------------------------------------


@KINDS
def test_a_truncated_file_is_refused_at_any_length(new):
    data = saved(small_model(), new)
    for length in [*range(64), *range(64, len(data), 29), len(data) - 1]:
        with pytest.raises(MechaError):
            opened(data[:length])


def test_bytes_after_a_legacy_file_are_refused():
    with pytest.raises(FileFormatError, match="something else follows"):
        opened(saved(small_model(), False) + b"\0")


@KINDS
def test_random_damage_gives_tensors_or_errors_of_the_family(new):
    rng, data = random.Random(1), saved(small_model(), new)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read_all(bytes(damaged))
        except MechaError:
            continue
