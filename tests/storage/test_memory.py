from __future__ import annotations

import threading
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha.errors import OutputError, RecipeTypeError
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import Reader, TensorEntry, Writer
from sd_mecha.storage.memory import MemoryReader, MemoryWriter
from tests.storage.support import ALL_DTYPES, entries_of, random_tensor, raw, read_bytes


def test_they_satisfy_the_contract():
    assert isinstance(MemoryReader({}), Reader)
    assert isinstance(MemoryWriter({}), Writer)


def base() -> torch.Tensor:
    return torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)


LAYOUTS = {
    "contiguous": base(),
    "transposed": base().transpose(0, 3),
    "inner transposed": base().transpose(2, 3),
    "one row, transposed": base()[:1].transpose(1, 2),
    "strided": base()[:, ::2, :, 1::2],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "flat strided": torch.arange(20.0)[::3],
    "scalar": base()[1, 2, 3, 4],
    "empty": torch.ones(0, 3).t(),
    "conjugated": torch.complex(torch.arange(4.0), torch.ones(4)).conj(),
    "negative view": torch.complex(torch.arange(4.0), torch.ones(4)).conj().imag,
    "parameter": torch.nn.Parameter(base()),
    "offset": base().view(-1)[7:31],
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_any_range_of_any_layout(tensor):
    reader = MemoryReader({"a": tensor})
    expected = raw(tensor.detach().resolve_neg())
    assert reader.entries["a"] == TensorEntry(tuple(tensor.shape), tensor.dtype)

    @given(st.integers(0, len(expected)), st.integers(0, len(expected)))
    def check(a, b):
        begin, end = sorted((a, b))
        buffer = bytearray(end - begin)
        reader.read_into("a", begin, memoryview(buffer))
        assert buffer == expected[begin:end]

    check()


@pytest.mark.parametrize("dtype", [*ALL_DTYPES, torch.complex128], ids=str)
def test_any_dtype(dtype):
    tensor = random_tensor(dtype, (3, 4))
    reader = MemoryReader({"a": tensor, "b": tensor.t()})
    assert read_bytes(reader, "a") == raw(tensor)
    assert read_bytes(reader, "b") == raw(tensor.t().contiguous())


def test_tensor_is_the_tensor_itself():
    tensor = torch.ones(2)
    reader = MemoryReader({"a": tensor, "b": tensor})
    assert reader.tensor("a") is tensor
    assert reader.tensor("b") is tensor


def test_buffers_are_copies():
    tensor = torch.ones(2)
    buffer = torch.zeros(2)
    MemoryReader({"a": tensor}).read_into("a", 0, byte_view(buffer))
    buffer += 1
    assert tensor.tolist() == [1, 1]


def test_metadata_is_kept_apart():
    reader = MemoryReader(MappingProxyType({"a": torch.ones(1), "__metadata__": {"mecha_recipe": "text"}}))
    assert dict(reader.metadata) == {"mecha_recipe": "text"}
    assert list(reader.entries) == ["a"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"state_dict": {"w": torch.ones(1)}},
            r"'state_dict' must be a tensor, got a dict; .* mapping\['state_dict'\]",
        ),
        ({"epoch": 3}, "mine: 'epoch' must be a tensor, got int"),
        ({"a": None}, "'a' must be a tensor, got NoneType"),
        ({1: torch.ones(1)}, "keys must be str, got int 1"),
        ({"__metadata__": {"a": 1}}, "'__metadata__' must map str to str, got dict"),
        ({"__metadata__": torch.ones(1)}, "'__metadata__' must map str to str, got Tensor"),
        ({"a": torch.ones(2).to_sparse()}, "'a' must be a dense tensor, got torch.sparse_coo .*to_dense"),
        ({"a": torch.ones(2, device="meta")}, "'a' is on the meta device"),
    ],
)
def test_what_is_not_a_tensor_is_refused(mapping, message):
    with pytest.raises(RecipeTypeError, match=message):
        MemoryReader(mapping, "mine")


def test_reading_outside_a_tensor_is_refused():
    reader = MemoryReader({"a": torch.ones(2)})
    for start in (-1, 8):
        with pytest.raises(ValueError, match="outside tensor 'a' of 8 bytes"):
            reader.read_into("a", start, memoryview(bytearray(1)))


def test_byte_view_refuses_what_has_no_such_memory():
    for tensor in (base().transpose(0, 1), LAYOUTS["conjugated"], torch.ones(2, device="meta")):
        with pytest.raises(ValueError, match="contiguous tensor on the CPU"):
            byte_view(tensor)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_tensors_are_read():
    tensor = base().cuda()
    reader = MemoryReader({"a": tensor, "b": tensor.transpose(0, 2)})
    assert read_bytes(reader, "a") == raw(base())
    assert read_bytes(reader, "b") == raw(base().transpose(0, 2))


TENSORS = {
    "b": random_tensor(torch.float16, (3, 5), 1),
    "a": random_tensor(torch.float64, (7,), 2),
    "empty": torch.ones(0, 4),
    "scalar": random_tensor(torch.float32, (), 3),
    "fp4": random_tensor(torch.float4_e2m1fn_x2, (2, 2), 4),
}


def fill(writer: MemoryWriter, names=TENSORS) -> None:
    for name in names:
        content = raw(TENSORS[name])
        for start in range(0, len(content), 3):
            writer.write(name, start, memoryview(content[start : start + 3]))


def test_commit_fills_the_mapping_in_declared_order():
    target = {"kept": 1}
    writer = MemoryWriter(target)
    writer.declare(entries_of(TENSORS), {"k": "v"})
    fill(writer, reversed(TENSORS))
    assert target == {"kept": 1}
    writer.commit()
    assert list(target) == ["kept", *TENSORS, "__metadata__"]
    assert target["__metadata__"] == {"k": "v"}
    for name, tensor in TENSORS.items():
        assert target[name].dtype == tensor.dtype
        assert target[name].shape == tensor.shape
        assert raw(target[name]) == raw(tensor)


def test_a_result_can_be_read_again():
    target: dict = {}
    writer = MemoryWriter(target)
    writer.declare(entries_of(TENSORS), {"k": "v"})
    fill(writer)
    writer.commit()
    reader = MemoryReader(target)
    assert reader.metadata == {"k": "v"}
    assert reader.entries == entries_of(TENSORS)


def test_dropped_tensors_are_left_out():
    target: dict = {}
    writer = MemoryWriter(target)
    writer.declare(entries_of(TENSORS), {})
    fill(writer, ["a", "b", "scalar", "fp4"])
    writer.drop("b")
    writer.drop("empty")
    writer.write("b", 0, memoryview(b"xx"))  # a worker that did not hear of it yet
    writer.commit()
    assert list(target) == ["a", "scalar", "fp4"]
    with pytest.raises(KeyError):
        writer.drop("nope")


def test_complete_gives_a_finished_tensor_early():
    writer = MemoryWriter({})
    writer.declare(entries_of(TENSORS), {})
    with pytest.raises(OutputError, match="'a' is incomplete: 0 of 56 bytes"):
        writer.complete("a")
    fill(writer, ["a"])
    assert raw(writer.complete("a")) == raw(TENSORS["a"])
    assert writer.complete("empty").shape == (0, 4)


def test_incomplete_result_leaves_the_mapping_untouched():
    target: dict = {}
    writer = MemoryWriter(target)
    writer.declare(entries_of(TENSORS), {})
    fill(writer, ["a"])
    with pytest.raises(OutputError, match="'b' is incomplete: 0 of 30"):
        writer.commit()
    assert target == {}


def test_abort_leaves_the_mapping_untouched():
    target: dict = {}
    writer = MemoryWriter(target)
    writer.declare(entries_of(TENSORS), {})
    fill(writer)
    writer.abort()
    writer.abort()
    assert target == {}


def test_no_memory_is_an_output_error():
    writer = MemoryWriter({})
    writer.declare({"a": TensorEntry((2**61,), torch.uint8)}, {})
    with pytest.raises(OutputError, match="no memory for 'a' of 2305843009213693952 bytes"):
        writer.write("a", 0, memoryview(b"x"))


def test_writing_outside_a_tensor_is_refused():
    writer = MemoryWriter({})
    writer.declare({"a": TensorEntry((2,), torch.uint8)}, {})
    for start in (-1, 2):
        with pytest.raises(ValueError, match="outside tensor 'a' of 2 bytes"):
            writer.write("a", start, memoryview(b"x"))


def test_threads_share_one_tensor():
    target: dict = {}
    writer = MemoryWriter(target)
    writer.declare({"a": TensorEntry((4000,), torch.uint8)}, {})

    def work(index: int) -> None:
        for start in range(index * 10, 4000, 40):
            writer.write("a", start, memoryview(bytes([start // 10 % 256]) * 10))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.commit()
    assert target["a"].tolist() == [i // 10 % 256 for i in range(4000)]
