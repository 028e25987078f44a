"""GGUF files that others made, read by range; and files of ours, read by the gguf package."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_mecha.errors import FileFormatError, OutputError, UnknownFormatError
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.files import RangeFile
from sd_mecha.storage.gguf.kinds import quantised_8
from sd_mecha.storage.gguf.layout import taken_over
from sd_mecha.storage.gguf.writer import GgufWriter
from tests.storage.gguf_support import (
    ALL_KINDS,
    WRITABLE_KINDS,
    file_of,
    info,
    opened,
    pair,
    read_range,
    read_tensor,
    same_bits,
    text,
    write_gguf,
)
from tests.storage.support import entries_of, raw

gguf = pytest.importorskip("gguf")


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _raw_kind(path: Path, kind: str, rows: int, columns: int) -> np.ndarray:
    """A file of random blocks of a kind; what the gguf package makes of them."""
    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 256, (rows, columns // block * nbytes), dtype=np.uint8)
    path.write_bytes(file_of([], [info("w", (columns, rows), int(number))], data.tobytes()))
    with np.errstate(all="ignore"):
        return gguf.dequantize(data, number)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_quantised_kind_is_read_as_the_gguf_package_reads_it(tmp_path: Path, kind: str) -> None:
    expected = _raw_kind(tmp_path / "a.gguf", kind, 5, 512)
    reader = opened(tmp_path / "a.gguf")
    assert reader.entries["w"] == TensorEntry((5, 512), torch.float32)
    assert same_bits(read_tensor(reader, "w"), expected)


@pytest.mark.parametrize("kind", WRITABLE_KINDS)
def test_any_range_of_a_quantised_tensor_is_read(tmp_path: Path, kind: str) -> None:
    reader = opened(write_gguf(tmp_path / "a.gguf", {"w": _noise(3, 512)}, {"w": kind}))
    whole = read_range(reader, "w")
    assert len(whole) == 3 * 512 * 4
    generator = torch.Generator().manual_seed(1)
    for start, end in (torch.randint(0, len(whole) + 1, (60, 2), generator=generator)).sort().values.tolist():
        assert read_range(reader, "w", start, end) == whole[start:end]
    with pytest.raises(ValueError, match="outside tensor"):
        read_range(reader, "w", len(whole) - 4, len(whole) + 4)


def test_long_ranges_are_put_together_from_pieces(tmp_path: Path) -> None:
    tensor = _noise(600, 512)
    reader = opened(write_gguf(tmp_path / "a.gguf", {"w": tensor}, {"w": "Q4_0"}))
    number = gguf.GGMLQuantizationType.Q4_0
    expected = gguf.dequantize(gguf.quantize(tensor.numpy(), number), number).tobytes()
    assert read_range(reader, "w", 5, len(expected) - 3) == expected[5:-3]


def test_threads_read_the_same(tmp_path: Path) -> None:
    reader = opened(write_gguf(tmp_path / "a.gguf", {"w": _noise(64, 512)}, {"w": "Q5_1"}))
    whole = read_range(reader, "w")
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: read_range(reader, "w", at, at + 1024), range(0, len(whole), 1024)))
    assert b"".join(parts) == whole


def test_plain_kinds_keep_their_dtype_and_torchs_order_of_sizes(tmp_path: Path) -> None:
    tensors = {
        "f64": _noise(3).double(),
        "f32": _noise(2, 3, 4),
        "f16": _noise(5, 7).half(),
        "bf16": _noise(4, 6).bfloat16(),
        "i8": torch.arange(-3, 3, dtype=torch.int8),
        "i16": torch.arange(4, dtype=torch.int16),
        "i32": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "i64": torch.arange(5),
    }
    reader = opened(write_gguf(tmp_path / "a.gguf", tensors))
    assert dict(reader.entries) == entries_of(tensors)
    for name, tensor in tensors.items():
        assert read_range(reader, name) == raw(tensor)


def test_what_a_file_says_of_its_model(tmp_path: Path) -> None:
    keys = {
        "general.name": "a name",
        "mecha.recipe": "version 0.1.0",
        "tokenizer.tokens": ["a", "b"],
        "long": "x" * 70_000,
        "number": 3,
    }
    reader = opened(write_gguf(tmp_path / "a.gguf", {"w": _noise(3)}, arch="llama", keys=keys))
    assert reader.metadata == {
        "general.architecture": "llama",
        "general.name": "a name",
        "mecha_recipe": "version 0.1.0",
    }


def test_a_shape_that_the_format_could_not_hold_is_restored(tmp_path: Path) -> None:
    shape = pair("comfy.gguf.orig_shape.w", 9, b"\x05\0\0\0\x05" + bytes(7) + np.int32([2, 1, 3, 1, 2]).tobytes())
    (tmp_path / "a.gguf").write_bytes(file_of([shape], [info("w", (12,))], bytes(48)))
    assert opened(tmp_path / "a.gguf").entries["w"].shape == (2, 1, 3, 1, 2)
    (tmp_path / "a.gguf").write_bytes(file_of([shape], [info("w", (13,))], bytes(52)))
    with pytest.raises(FileFormatError, match=r"orig_shape.w is .*expected a shape of 13 elements"):
        opened(tmp_path / "a.gguf")


def test_holes_another_alignment_and_version_2_are_read(tmp_path: Path) -> None:
    aligned = pair("general.alignment", 4, b"\x08\0\0\0")
    path = tmp_path / "a.gguf"
    infos = [info("b", (2,), 0, 16), info("a", (2,))]
    head = file_of([aligned], infos, version=2)
    length = 24 + len(aligned) + sum(map(len, infos))
    path.write_bytes(head[: -(-length // 8) * 8] + np.float32([1, 2, 9, 9, 3, 4]).tobytes())
    reader = opened(path)
    assert list(reader.entries) == ["a", "b"]
    assert read_tensor(reader, "a").tolist() == [1, 2]
    assert read_tensor(reader, "b").tolist() == [3, 4]


def test_only_quantised_files_need_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_gguf(tmp_path / "plain.gguf", {"w": _noise(32)})
    small = write_gguf(tmp_path / "small.gguf", {"w": _noise(1, 32)}, {"w": "Q5_0"})
    monkeypatch.setitem(sys.modules, "gguf", None)
    from sd_mecha.storage.gguf import kinds as gguf_kinds

    gguf_kinds._quantised.cache_clear()
    assert read_range(opened(plain), "w") == raw(_noise(32))
    with pytest.raises(UnknownFormatError, match=r"small.gguf.*'w'.*pip install 'sd-mecha\[gguf\]'"):
        opened(small)


def test_a_kind_that_nobody_knows_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(file_of([], [info("w", (32,), 999)], bytes(64)))
    with pytest.raises(FileFormatError, match=r"'w' is stored as kind 999 .*install a newer one"):
        opened(tmp_path / "a.gguf")


@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e30])
def test_q8_0_is_what_the_gguf_package_makes(scale: float) -> None:
    values = _noise(640) * scale
    values[:32] = 0
    values[40:72] = torch.arange(-16, 16) * 0.5  # halves, which go away from zero
    values[71] = 127
    with np.errstate(all="ignore"):
        expected = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    if scale < 1e30:  # beyond float16 the package's scale is inf, and its numbers are anything
        assert bytes(byte_view(quantised_8(values))) == expected.tobytes()
    assert quantised_8(values).shape == expected.shape


def _write(path: Path, tensors: dict[str, torch.Tensor], **given: object) -> GgufWriter:
    writer = GgufWriter(path, **given)  # type: ignore[arg-type]
    writer.declare(entries_of(tensors), {"format": "pt", "mecha_recipe": "version 0.1.0", "title": "a title"})
    return writer


def _scatter(writer: GgufWriter, tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Write everything in pieces of any size, in any order."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, tensor in tensors.items():
        data = raw(tensor)
        cuts = sorted({0, len(data), *torch.randint(0, len(data) + 1, (9,), generator=generator).tolist()})
        parts += [(name, start, data[start:end]) for start, end in itertools.pairwise(cuts)]
    for at in torch.randperm(len(parts), generator=generator).tolist():
        name, start, data = parts[at]
        writer.write(name, start, memoryview(data))


_MIXED = {
    "matrix": _noise(6, 64),
    "odd": _noise(4, 3),
    "bias": _noise(5).half(),
    "half": _noise(3, 32).half(),
    "brain": _noise(2, 96).bfloat16(),
    "video": _noise(2, 1, 3, 2, 32),
    "scalar": torch.tensor(2.5),
    "ids": torch.arange(3),
}


def test_plain_output_is_read_by_the_gguf_package(tmp_path: Path) -> None:
    writer = _write(tmp_path / "a.gguf", _MIXED)
    _scatter(writer, _MIXED, 0)
    writer.commit()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds == {
        "matrix": "F32", "odd": "F32", "bias": "F32", "half": "F16", "brain": "BF16", "video": "F32", "scalar": "F32",
        "ids": "I64",
    }  # fmt: skip
    for name, tensor in _MIXED.items():
        if name == "brain":
            assert found[name].data.tobytes() == raw(tensor)
        else:
            assert np.array_equal(found[name].data.reshape(tensor.shape), tensor.numpy())
    assert found["matrix"].shape.tolist() == [64, 6]
    assert found["video"].shape.tolist() == [32, 2, 3, 2]
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["mecha.recipe"].contents() == "version 0.1.0"
    assert fields["title"].contents() == "a title"
    assert fields["general.file_type"].contents() == 0
    assert "format" not in fields
    reader = opened(tmp_path / "a.gguf")
    assert {name: entry.shape for name, entry in reader.entries.items()} == {
        n: tuple(t.shape) for n, t in _MIXED.items()
    }
    assert all(torch.equal(read_tensor(reader, name), tensor) for name, tensor in _MIXED.items())


def test_q8_0_output_is_read_by_the_gguf_package(tmp_path: Path) -> None:
    writer = _write(tmp_path / "a.gguf", _MIXED, quantised=True)
    _scatter(writer, _MIXED, 1)
    writer.commit()
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name in ("matrix", "half", "brain", "video"):
        assert found[name].tensor_type.name == "Q8_0"
        tensor = _MIXED[name].float().numpy()
        expected = gguf.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
        assert found[name].data.tobytes() == expected.tobytes()
    assert found["odd"].tensor_type.name == "F32"
    assert found["bias"].tensor_type.name == "F32"
    assert reader.fields["general.file_type"].contents() == 7
    assert reader.fields["general.quantization_version"].contents() == 2


@pytest.mark.parametrize("quantised", [False, True])
def test_the_order_of_writing_does_not_show(tmp_path: Path, quantised: bool) -> None:
    for seed in (0, 1):
        writer = _write(tmp_path / f"{seed}.gguf", _MIXED, quantised=quantised)
        _scatter(writer, _MIXED, seed)
        writer.commit()
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()


@pytest.mark.parametrize("quantised", [False, True])
def test_dropped_tensors_leave_no_trace(tmp_path: Path, quantised: bool) -> None:
    kept = {name: tensor for name, tensor in _MIXED.items() if name not in ("matrix", "half", "video")}
    writer = _write(tmp_path / "a.gguf", _MIXED, quantised=quantised)
    _scatter(writer, kept, 0)
    writer.write("half", 0, memoryview(raw(_MIXED["half"])[:7]))
    for name in ("matrix", "half", "video"):
        writer.drop(name)
    writer.commit()
    writer = _write(tmp_path / "b.gguf", kept, quantised=quantised)
    _scatter(writer, kept, 0)
    writer.commit()
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_unfinished_blocks_are_not_published(tmp_path: Path) -> None:
    tensors = {"w": _noise(2, 32)}
    writer = _write(tmp_path / "a.gguf", tensors, quantised=True)
    writer.write("w", 0, memoryview(raw(tensors["w"])[:-1]))
    with pytest.raises(OutputError, match="'w' is incomplete"):
        writer.commit()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_the_format_lacks_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(OutputError, match=r"'w' is .*choose float32, float16 or bfloat16"):
        _write(tmp_path / "a.gguf", {"w": torch.zeros(2, 2).to(dtype)})
    assert not list(tmp_path.iterdir())


def test_keys_of_another_file_go_along(tmp_path: Path) -> None:
    keys = {
        "tokenizer.tokens": ["a", "bc"],
        "general.name": "theirs",
        "general.file_type": 99,
        "split.count": 1,
        "mecha.recipe": "old",
        "mecha.dtypes": "float64",
        "title": "their title",
    }
    source = RangeFile(write_gguf(tmp_path / "other.gguf", {"w": _noise(3)}, arch="llama", keys=keys))
    writer = _write(tmp_path / "a.gguf", _MIXED, keys=taken_over(source))
    _scatter(writer, _MIXED, 0)
    writer.commit()
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert {key: field.contents() for key, field in fields.items() if not key.startswith(("GGUF.", "comfy."))} == {
        "general.architecture": "llama",
        "tokenizer.tokens": ["a", "bc"],
        "general.name": "theirs",
        "title": "their title",
        "mecha.recipe": "version 0.1.0",
        "mecha.dtypes": "bfloat16 float16 float32",
        "general.file_type": 0,
    }


def test_a_text_that_is_not_unicode_is_copied_but_not_shown(tmp_path: Path) -> None:
    odd = pair("odd", 8, text(b"\xff\xfe"))
    (tmp_path / "a.gguf").write_bytes(file_of([odd], [info("w", (1,))], bytes(4)))
    assert opened(tmp_path / "a.gguf").metadata == {}
    assert taken_over(RangeFile(tmp_path / "a.gguf")) == {"odd": odd}


@pytest.mark.parametrize("quantised", [False, True])
def test_an_interrupted_output_is_gone_on_with(tmp_path: Path, quantised: bool) -> None:
    for name in ("a.gguf", "b.gguf"):
        writer = _write(tmp_path / name, _MIXED, quantised=quantised, resume="the same")
        done = {key: _MIXED[key] for key in ("matrix", "bias", "video")} if name == "a.gguf" else {}
        _scatter(writer, done, 0)
        for key in done:
            writer.finished(key)
        if done:
            writer.write("brain", 0, memoryview(raw(_MIXED["brain"])[:9]))
            writer.abort()
            writer = _write(tmp_path / name, _MIXED, quantised=quantised, resume="the same")
            assert writer.completed == done.keys()
        _scatter(writer, {key: tensor for key, tensor in _MIXED.items() if key not in done}, 1)
        writer.commit()
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
