"""Matrices that bitsandbytes quantised, against what the library itself makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.memory import MemoryReader
from sd_mecha.storage.quantised.views import as_floats
from tests.storage.support import read_bytes

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def _state(kind: str = "nf4", **fields: Any) -> torch.Tensor:
    state = {"quant_type": kind, "blocksize": 4, "dtype": "float32", "shape": [2, 5], **fields}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _model(nested: bool = False, **fields: Any) -> dict[str, torch.Tensor]:
    """Ten values in blocks of four: 0 1 2 3 | 4 5 6 7 | 8 9, each an index into the map."""
    key = "layer.weight"
    found = {
        key: torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89], dtype=torch.uint8).reshape(-1, 1),
        f"{key}.absmax": torch.tensor([1.0, 2.0, 4.0]),
        f"{key}.quant_map": torch.tensor(NF4),
        "layer.bias": torch.ones(2),
    }
    if nested:
        fields = {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.5, **fields}
        found[f"{key}.absmax"] = torch.tensor([1, 3, 7], dtype=torch.uint8)
        found[f"{key}.nested_absmax"] = torch.tensor([2.0, 1.0])
        found[f"{key}.nested_quant_map"] = torch.arange(256) / 4
    found[f"{key}.quant_state.bitsandbytes__nf4"] = _state(**fields)
    return found


def _expected(scales: list[float]) -> torch.Tensor:
    return (torch.tensor(NF4)[:10] * torch.tensor(scales).repeat_interleave(4)[:10]).reshape(2, 5)


def _values(reader: Reader, key: str) -> torch.Tensor:
    entry = reader.entries[key]
    return torch.frombuffer(bytearray(read_bytes(reader, key)), dtype=entry.dtype).reshape(entry.shape)


def test_four_bits_are_the_values_of_the_map_times_their_scales() -> None:
    reader = as_floats(MemoryReader(_model()))
    assert dict(reader.entries) == {
        "layer.weight": TensorEntry((2, 5), torch.float32),
        "layer.bias": TensorEntry((2,), torch.float32),
    }
    assert torch.equal(_values(reader, "layer.weight"), _expected([1, 2, 4]))
    assert torch.equal(_values(reader, "layer.bias"), torch.ones(2))


def test_scales_may_be_quantised_themselves() -> None:
    reader = as_floats(MemoryReader(_model(nested=True)))
    # 1/4 * 2 + 1/2, 3/4 * 2 + 1/2, 7/4 * 1 + 1/2
    assert torch.equal(_values(reader, "layer.weight"), _expected([1.0, 2.0, 2.25]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_the_model_before(dtype: torch.dtype) -> None:
    reader = as_floats(MemoryReader(_model(dtype=str(dtype).removeprefix("torch."))))
    assert torch.equal(_values(reader, "layer.weight"), _expected([1, 2, 4]).to(dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_any_range_is_read(nested: bool) -> None:
    reader = as_floats(MemoryReader(_model(nested=nested)))
    whole = read_bytes(reader, "layer.weight")
    for start in range(len(whole) + 1):
        for end in range(start, len(whole) + 1):
            part = bytearray(end - start)
            reader.read_into("layer.weight", start, memoryview(part))
            assert part == whole[start:end]


def test_bytes_may_be_kept_as_another_dtype() -> None:
    tensors = _model(shape=[2, 6])
    tensors["layer.weight"] = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB], dtype=torch.uint8).view(torch.bfloat16)
    reader = as_floats(MemoryReader(tensors))
    assert _values(reader, "layer.weight").flatten()[:10].tolist() == _expected([1, 2, 4]).flatten().tolist()


def test_long_matrices_are_put_together_from_pieces() -> None:
    count = 150_001
    packed = torch.randint(0, 256, (75_001,), dtype=torch.uint8)
    scales = torch.rand(-(-count // 64))
    tensors = _model(blocksize=64, shape=[count])
    tensors.update({"layer.weight": packed, "layer.weight.absmax": scales})
    halves = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count].long()
    expected = torch.tensor(NF4)[halves] * scales.repeat_interleave(64)[:count]
    assert torch.equal(_values(as_floats(MemoryReader(tensors)), "layer.weight"), expected)


def test_eight_bits_are_whole_numbers_times_the_scale_of_their_row() -> None:
    weight = torch.tensor([[-127, 0, 5], [127, 64, -1]], dtype=torch.int8)
    tensors = {
        "x.weight": weight,
        "x.SCB": torch.tensor([2.0, 3.0]),
        "x.weight_format": torch.tensor(0).to(torch.uint8),
    }
    reader = as_floats(MemoryReader(tensors))
    assert dict(reader.entries) == {"x.weight": TensorEntry((2, 3), torch.float32)}
    torch.testing.assert_close(_values(reader, "x.weight"), weight * torch.tensor([[2.0], [3.0]]) / 127)
    tensors["x.weight_format"] += 2
    with pytest.raises(FileFormatError, match=r"x.weight.*order \[2\]"):
        as_floats(MemoryReader(tensors))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer.weight.absmax": None}, "absmax' is missing"),
        ({"layer.weight.absmax": torch.ones(2)}, "absmax' has 2 numbers.*expected 3"),
        ({"layer.weight.absmax": torch.ones(3).half()}, "absmax' has 3 numbers of torch.float16"),
        ({"layer.weight.absmax": torch.ones(3, dtype=torch.uint8)}, "nested_blocksize is None"),
        ({"layer.weight.quant_map": torch.ones(8)}, "quant_map' has 8 numbers.*expected 16"),
        ({"layer.weight": torch.ones(4, dtype=torch.uint8)}, "4 bytes for its shape .*expected 5"),
        ({"layer.weight": None}, "no bytes for its shape"),
        ({"state": _state(shape=[2**62, 4])}, "elements can be counted in 63 bits"),
        ({"state": _state(shape=[-2, -5])}, "shape is .*expected a list of whole numbers"),
        ({"state": _state(shape="many")}, "expected a list of whole numbers"),
        ({"state": _state(blocksize=0)}, "blocksize is 0"),
        ({"state": _state(dtype="int4")}, "dtype is 'int4'; expected one of float32"),
        ({"state": torch.tensor([1, 2], dtype=torch.uint8)}, "does not start with"),
        ({"state": torch.ones(3)}, "JSON"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    tensors = _model()
    for key, tensor in changes.items():
        name = "layer.weight.quant_state.bitsandbytes__nf4" if key == "state" else key
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    with pytest.raises(FileFormatError, match=says) as caught:
        as_floats(MemoryReader(tensors, "the model"))
    assert "the model" in str(caught.value)
    assert "layer.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "scheme"),
    [
        (["x.qweight", "x.qzeros", "x.scales", "x.g_idx"], "GPTQ,"),
        (["x.qweight", "x.qzeros", "x.scales"], "AWQ"),
        (["x.weight_packed", "x.weight_scale", "x.weight_shape"], "compressed-tensors"),
        (["x.weight", "x.weight_scale"], "compressed-tensors"),
        (["x.weight", "x.weight_scales"], "EETQ"),
        (["x.weight._data", "x.weight._scale"], "quanto"),
        (["x.float8_data", "x.scale", "x.scale_reciprocal"], "flux-fp8-api"),
        (["x._weight_qdata", "x._weight_scale"], "torchao"),
        (["experts.gate_up_proj_blocks", "experts.gate_up_proj_scales"], "MXFP4"),
    ],
)
def test_other_schemes_are_named_and_refused(names: list[str], scheme: str) -> None:
    tensors = {name: torch.ones(4, dtype=torch.int32) for name in names}
    with pytest.raises(FileFormatError, match=scheme):
        as_floats(MemoryReader(tensors))
    as_floats(MemoryReader({name: tensor.float() for name, tensor in tensors.items()}))  # floats mean what they say


def test_a_matrix_that_the_library_wrote_is_near_what_it_was() -> None:
    tensors = _model(blocksize=64, shape=[3, 24])
    packed = bytes.fromhex("001111222334445555666667777777777777777777777777888888999aaabbccdddeeeff")
    tensors["layer.weight"] = torch.tensor(list(packed), dtype=torch.uint8)
    tensors["layer.weight.absmax"] = torch.ones(2)
    original = torch.linspace(-1, 1, 72).reshape(3, 24) ** 3
    error = (_values(as_floats(MemoryReader(tensors)), "layer.weight") - original).abs().max()
    assert error < 0.16  # half of the widest gap in the map


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_those_of_the_library(kind: str, nested: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    # Rows of whole blocks: on the CPU, release 0.50 takes the wrong scales for others.
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    parts = {f"w.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    reader = as_floats(MemoryReader({"w.weight": packed, **parts}))
    assert list(reader.entries) == ["w.weight"]
    assert torch.equal(_values(reader, "w.weight"), functional.dequantize_4bit(packed, state))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_eight_bit_values_are_those_of_the_library() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0)).half()
    packed, scales, _ = functional.int8_vectorwise_quant(weight)
    reader = as_floats(MemoryReader({"w.weight": packed, "w.SCB": scales}))
    assert torch.equal(_values(reader, "w.weight"), functional.int8_vectorwise_dequant(packed, scales))
