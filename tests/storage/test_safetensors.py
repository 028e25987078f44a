from __future__ import annotations

import errno
import os
import random
import threading
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sd_mecha.errors import ChangedInputError, FileFormatError, ModelNotFoundError, OutputError
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import Reader, TensorEntry, Writer
from sd_mecha.storage.safetensors import SafetensorsReader, SafetensorsWriter
from tests.storage.support import ALL_DTYPES, entries_of, file_bytes, random_tensor, raw, read_bytes

TENSORS = {
    "half": random_tensor(torch.float16, (3, 5), 1),
    "wide": random_tensor(torch.float64, (7,), 2),
    "scalar": random_tensor(torch.float32, (), 3),
    "empty": random_tensor(torch.float32, (0, 4), 4),
    "flags": random_tensor(torch.bool, (5,), 5),
    "fp8": random_tensor(torch.float8_e4m3fn, (3, 3), 6),
}


def write_all(writer: SafetensorsWriter, tensors: dict[str, torch.Tensor], names=None) -> None:
    for name in names or tensors:
        writer.write(name, 0, memoryview(raw(tensors[name])))


def save(path, tensors, metadata=None, dropped=(), names=None) -> bytes:
    writer = SafetensorsWriter(path)
    writer.declare(entries_of(tensors), metadata or {})
    for name in dropped:
        writer.drop(name)
    write_all(writer, tensors, names)
    writer.commit()
    return path.read_bytes()


def reference_bytes(path) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in safetensors.torch.load_file(path).items()}


def test_they_satisfy_the_contract(tmp_path):
    path = tmp_path / "model.safetensors"
    assert isinstance(SafetensorsWriter(path), Writer)
    save(path, TENSORS)
    reader = SafetensorsReader(path)
    assert isinstance(reader, Reader)
    reader.close()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype_both_ways(tmp_path, platform, dtype):
    shapes = {"a": (3, 4), "e": (0, 2), "b": (1,)}
    if dtype is not torch.float4_e2m1fn_x2:  # the format has no 0-d tensor of half bytes
        shapes["s"] = ()
    tensors = {name: random_tensor(dtype, shape, 1) for name, shape in shapes.items()}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save(ours, tensors)
    safetensors.torch.save_file(tensors, theirs)
    for path in (ours, theirs):
        read = safetensors.torch.load_file(path)
        reader = SafetensorsReader(path)
        assert dict(reader.entries) == entries_of(tensors)
        for name, tensor in tensors.items():
            assert read_bytes(reader, name) == raw(tensor) == raw(read[name])
            assert read[name].dtype == dtype
            assert read[name].shape == tensor.shape
        reader.close()


@st.composite
def state_dicts(draw):
    names = draw(st.lists(st.text('ab.é"\\\n', max_size=6), unique=True, max_size=6))
    tensors = {}
    for seed, name in enumerate(names):
        dtype = draw(st.sampled_from(ALL_DTYPES))
        least = 1 if dtype is torch.float4_e2m1fn_x2 else 0
        shape = tuple(draw(st.lists(st.integers(0, 5), min_size=least, max_size=3)))
        tensors[name] = random_tensor(dtype, shape, seed)
    return tensors


METADATA = st.dictionaries(st.text('abé"\\\n', max_size=5), st.text('abé"\\\n', max_size=5), max_size=3)


@given(state_dicts(), METADATA, st.randoms(use_true_random=False), st.data())
def test_any_model_written_in_any_order_is_read_by_the_reference(tmp_path_factory, tensors, metadata, rng, data):
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    dropped = data.draw(st.sets(st.sampled_from(sorted(tensors)))) if tensors else set()
    chunks = []
    for name, tensor in tensors.items():
        content, start = raw(tensor), 0
        while start < len(content):
            size = rng.randint(1, 40)
            chunks.append((name, start, content[start : start + size]))
            start += size
    rng.shuffle(chunks)
    late = rng.randint(0, len(chunks))
    writer = SafetensorsWriter(path)
    writer.declare(entries_of(tensors), metadata)
    for name, start, chunk in chunks[:late]:
        writer.write(name, start, memoryview(chunk))
    for name in dropped:
        writer.drop(name)
    for name, start, chunk in chunks[late:]:
        if name not in dropped:
            writer.write(name, start, memoryview(chunk))
    writer.commit()

    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    assert reference_bytes(path) == {name: raw(tensor) for name, tensor in kept.items()}
    with safe_open(path, "pt") as reference:
        assert (reference.metadata() or {}) == metadata
    reader = SafetensorsReader(path)
    assert dict(reader.entries) == entries_of(kept)
    assert reader.metadata == metadata
    reader.close()


@given(state_dicts(), st.data())
def test_files_of_the_reference_are_read_by_range(tmp_path_factory, tensors, data):
    path = tmp_path_factory.getbasetemp() / "reference.safetensors"
    safetensors.torch.save_file(tensors, path, {"k": "v"})
    reader = SafetensorsReader(path)
    assert dict(reader.entries) == entries_of(tensors)
    assert reader.metadata == {"k": "v"}
    for name, tensor in tensors.items():
        content = raw(tensor)
        begin, end = sorted((data.draw(st.integers(0, len(content))), data.draw(st.integers(0, len(content)))))
        buffer = bytearray(end - begin)
        reader.read_into(name, begin, memoryview(buffer))
        assert buffer == content[begin:end]
    reader.close()


def test_bytes_do_not_depend_on_the_order_of_writing(tmp_path):
    names = list(TENSORS)
    first = save(tmp_path / "a", TENSORS, {"k": "v"}, dropped=["wide"])
    random.Random(1).shuffle(names)
    assert save(tmp_path / "b", TENSORS, {"k": "v"}, dropped=["wide"], names=names) == first


def test_without_drops_a_file_is_what_the_reference_would_write(tmp_path):
    tensors = {
        "a": torch.ones(2, dtype=torch.float64),
        "b": torch.ones(3),
        "c": torch.ones(1, dtype=torch.uint8),
    }
    ours = save(tmp_path / "ours", tensors, {"format": "pt"})
    assert ours == safetensors.torch.save(tensors, {"format": "pt"})


def test_tensors_are_aligned_in_declared_order(tmp_path):
    path = tmp_path / "model.safetensors"
    content = save(path, TENSORS)
    reader = SafetensorsReader(path)
    assert list(reader.entries) == ["wide", "scalar", "empty", "half", "flags", "fp8"]
    reader.close()
    for name, tensor in TENSORS.items():
        if tensor.numel() > 1:
            assert content.index(raw(tensor)) % tensor.itemsize == 0, name


def test_dropping_everything_leaves_a_valid_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, TENSORS, {"k": "v"}, dropped=TENSORS)
    assert safetensors.torch.load_file(path) == {}
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == {"k": "v"}


def test_declaring_nothing_leaves_a_valid_file(tmp_path, platform):
    path = tmp_path / "model.safetensors"
    save(path, {})
    assert safetensors.torch.load_file(path) == {}


def test_buffers_of_any_format(tmp_path):
    path = tmp_path / "model.safetensors"
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    writer = SafetensorsWriter(path)
    writer.declare({"a": TensorEntry((2, 3), torch.float32)}, {})
    writer.write("a", 0, memoryview(tensor.numpy()))
    writer.commit()
    reader = SafetensorsReader(path)
    target = torch.zeros(2, 3)
    reader.read_into("a", 0, memoryview(target.numpy()))
    assert torch.equal(target, tensor)
    reader.close()


def test_threads_write_and_read_at_once(tmp_path, platform):
    path = tmp_path / "model.safetensors"
    tensors = {f"t{i}": random_tensor(torch.float16, (100 + i,), i) for i in range(40)}
    writer = SafetensorsWriter(path)
    writer.declare(entries_of(tensors), {})

    def work(names):
        for name in names:
            content = raw(tensors[name])
            for start in range(0, len(content), 30):
                writer.write(name, start, memoryview(content[start : start + 30]))

    names = list(tensors)
    threads = [threading.Thread(target=work, args=(names[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.commit()
    assert reference_bytes(path) == {name: raw(tensor) for name, tensor in tensors.items()}


def test_output_over_its_own_input(tmp_path, platform):
    path = tmp_path / "model.safetensors"
    save(path, TENSORS)
    reader = SafetensorsReader(path)
    writer = SafetensorsWriter(path)
    writer.declare(reader.entries, reader.metadata)
    for name in reader.entries:
        writer.write(name, 0, memoryview(read_bytes(reader, name)))
    reader.check_unchanged()
    reader.close()
    writer.commit()
    assert reference_bytes(path) == {name: raw(tensor) for name, tensor in TENSORS.items()}


def test_ranges_outside_a_tensor_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, TENSORS)
    reader = SafetensorsReader(path)
    for start in (-1, 30, 2**70):
        with pytest.raises(ValueError, match="outside tensor 'half' of 30 bytes"):
            reader.read_into("half", start, memoryview(bytearray(1)))
    with pytest.raises(KeyError):
        reader.read_into("nope", 0, memoryview(bytearray(1)))
    reader.close()
    writer = SafetensorsWriter(path)
    writer.declare(entries_of(TENSORS), {})
    for start in (-1, 30, 2**70):
        with pytest.raises(ValueError, match="outside tensor 'half' of 30 bytes"):
            writer.write("half", start, memoryview(b"x"))
    for call in (lambda: writer.write("nope", 0, memoryview(b"x")), lambda: writer.drop("nope")):
        with pytest.raises(KeyError):
            call()
    writer.abort()


def test_incomplete_tensor_is_not_published(tmp_path):
    writer = SafetensorsWriter(tmp_path / "model.safetensors")
    writer.declare(entries_of(TENSORS), {})
    write_all(writer, TENSORS, ["wide", "scalar", "flags", "fp8"])
    writer.write("half", 0, memoryview(bytes(10)))
    with pytest.raises(OutputError, match="tensor 'half' is incomplete: 10 of 30 bytes were written"):
        writer.commit()
    assert os.listdir(tmp_path) == []


def test_abort_leaves_nothing(tmp_path, platform):
    path = tmp_path / "model.safetensors"
    before = save(path, TENSORS)
    writer = SafetensorsWriter(path)
    writer.abort()
    writer.declare(entries_of(TENSORS), {})
    write_all(writer, TENSORS)
    writer.abort()
    writer.abort()
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", range(9))
def test_disk_that_fails_at_any_write(tmp_path, monkeypatch, code, step):
    """Five tensors, three moves into gaps and a header: whichever write fails, the old file stays."""
    path = tmp_path / "model.safetensors"
    before = save(path, TENSORS)
    count, pwrite = [0], os.pwrite

    def failing(*args):
        count[0] += 1
        if count[0] > step:
            raise OSError(code, os.strerror(code))
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", failing)
    writer = SafetensorsWriter(path)
    writer.declare(entries_of(TENSORS), {})
    with pytest.raises(OutputError, match=os.strerror(code)):  # noqa: PT012
        write_all(writer, TENSORS, ["wide", "scalar", "half", "flags", "fp8"])
        writer.drop("scalar")
        writer.commit()
    writer.abort()
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "entry", "metadata", "message"),
    [
        (
            "a",
            TensorEntry((1,), torch.complex128),
            {},
            "'a': the format has no dtype for torch.complex128; cast",
        ),
        ("a", TensorEntry((), torch.float4_e2m1fn_x2), {}, "holds no 0-d tensor of torch.float4"),
        ("__metadata__", TensorEntry((1,), torch.float32), {}, "cannot be named '__metadata__'"),
        ("\ud800", TensorEntry((1,), torch.float32), {}, "not valid Unicode"),
        ("a", TensorEntry((1,), torch.float32), {"k": 1}, "metadata must map str to str, got 'k': 1"),
        ("a" * 100_000_000, TensorEntry((1,), torch.float32), {}, "the format allows 100000000"),
    ],
    ids=["dtype", "half bytes", "reserved name", "surrogate", "metadata", "size"],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_created(tmp_path, name, entry, metadata, message):
    writer = SafetensorsWriter(tmp_path / "model.safetensors")
    with pytest.raises(OutputError, match=message):
        writer.declare({name: entry}, metadata)
    assert os.listdir(tmp_path) == []


def test_calls_out_of_order_are_refused(tmp_path):
    writer = SafetensorsWriter(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="commit without declare"):
        writer.commit()
    writer.declare({}, {})
    with pytest.raises(ValueError, match="declared twice"):
        writer.declare({}, {})
    writer.abort()


def test_unaligned_header(tmp_path):
    path = tmp_path / "model.safetensors"
    for spaces in range(8):
        header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        path.write_bytes(file_bytes(header, b"12345678", padding=b" " * spaces))
        reader = SafetensorsReader(path)
        assert read_bytes(reader, "a") == b"12345678"
        reader.close()


def test_truncation_at_every_byte_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    content = save(path, {"a": torch.ones(2), "e": torch.ones(0)})
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError, match=r"model\.safetensors"):
            SafetensorsReader(path)


def test_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    content = save(path, TENSORS)
    reader = SafetensorsReader(path)
    with path.open("rb+") as stream:
        stream.truncate(len(content) - 4)
    with pytest.raises(ChangedInputError, match="shortened"):
        read_bytes(reader, "fp8")
    with pytest.raises(ChangedInputError, match="size was"):
        reader.check_unchanged()
    reader.close()


def test_missing_file_shows_what_was_asked_for(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"model 'mine' \(resolved to '.*nope"):
        SafetensorsReader(tmp_path / "nope.safetensors", requested="mine")


@pytest.mark.slow
def test_hundred_thousand_tensors(tmp_path):
    path = tmp_path / "many.safetensors"
    entries = {f"model.blocks.{i}.weight": TensorEntry((1,), torch.uint8) for i in range(100_000)}
    buffer = byte_view(torch.ones(1, dtype=torch.uint8))
    start = time.process_time()
    writer = SafetensorsWriter(path)
    writer.declare(entries, {})
    for name in entries:
        writer.write(name, 0, buffer)
    writer.commit()
    written = time.process_time()
    reader = SafetensorsReader(path)
    read = time.process_time()
    assert reader.entries == entries
    reader.close()
    assert written - start < 5  # each takes about one second
    assert read - written < 3
