"""GGUF files in recipes: as good as the same tensors in any other format, and readable by others afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.errors import FileFormatError, OptionError, OutputError
from tests.storage.gguf_support import WRITABLE_KINDS, file_of, info, write_gguf

gguf = pytest.importorskip("gguf")


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (64, 256), "b.weight": (3, 512), "a.bias": (64,), "conv.weight": (8, 4, 3, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _average(*models: object, output: object = None, **options: Any) -> Any:
    recipe = sd_mecha.n_average(*(sd_mecha.model(model) for model in models))
    merged = sd_mecha.merge(recipe, output=output, **{"output_dtype": None, "merge_dtype": "fp32", **options})
    return {key: tensor for key, tensor in (merged or {}).items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.parametrize("kind", WRITABLE_KINDS)
@pytest.mark.parametrize("threads", [1, 4])
def test_merging_is_that_of_the_same_tensors_in_another_format(tmp_path: Path, kind: str, threads: int) -> None:
    plain = []
    for seed in (0, 1):
        tensors = _tensors(seed)
        kinds = {"a.weight": kind, "b.weight": kind}
        write_gguf(tmp_path / f"{seed}.gguf", tensors, kinds)
        number = gguf.GGMLQuantizationType[kind]
        for name in kinds:
            tensors[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(tensors[name].numpy(), number), number))
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        plain.append(tensors)
    out = tmp_path / "out.safetensors"
    _average(tmp_path / "0.gguf", tmp_path / "1.gguf", output=out, threads=threads, total_buffer_size=2**18)
    expected = tmp_path / "expected.safetensors"
    _average(tmp_path / "0.safetensors", tmp_path / "1.safetensors", output=expected)
    found, wanted = load_file(out), load_file(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.safetensors", _tensors(0))
    found = _average(path)
    assert torch.equal(found["a.weight"], _tensors(0)["a.weight"])


def test_output_keeps_what_the_first_gguf_input_says(tmp_path: Path) -> None:
    save_file(_tensors(0), tmp_path / "0.safetensors")
    write_gguf(tmp_path / "1.gguf", _tensors(1), arch="llama", keys={"tokenizer.ggml.tokens": ["<s>", "a"]})
    out = tmp_path / "out.gguf"
    _average(tmp_path / "0.safetensors", tmp_path / "1.gguf", output=out)
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["<s>", "a"]
    assert "n_average" in reader.fields["mecha.recipe"].contents()
    expected = _average(tmp_path / "0.safetensors", tmp_path / "1.gguf")
    for tensor in reader.tensors:
        wanted = expected[tensor.name]
        assert torch.equal(torch.from_numpy(tensor.data.copy()).reshape(wanted.shape), wanted)


@pytest.mark.parametrize("as_folder", [False, True])
def test_keys_come_from_the_side_files_where_they_are_given(tmp_path: Path, as_folder: bool) -> None:
    write_gguf(tmp_path / "1.gguf", _tensors(1), arch="llama")
    (tmp_path / "side").mkdir()
    side = write_gguf(tmp_path / "side" / "model.gguf", {"x": torch.ones(1)}, arch="qwen3")
    out = tmp_path / "out.gguf"
    _average(tmp_path / "1.gguf", output=out, side_files=side.parent if as_folder else side)
    assert gguf.GGUFReader(out).fields["general.architecture"].contents() == "qwen3"


def test_side_files_without_a_gguf_file_are_refused(tmp_path: Path) -> None:
    save_file(_tensors(0), tmp_path / "0.safetensors")
    with pytest.raises(OptionError, match=r"side_files=.*has no GGUF file"):
        _average(tmp_path / "0.safetensors", output=tmp_path / "o.gguf", side_files=tmp_path / "0.safetensors")
    with pytest.raises(OptionError, match="shard_size"):
        _average(tmp_path / "0.safetensors", output=tmp_path / "o.gguf", shard_size="1GB")


@pytest.mark.parametrize("threads", [1, 4])
def test_q8_0_output_is_quantised_as_the_gguf_package_does_it(tmp_path: Path, threads: int) -> None:
    save_file(_tensors(0), tmp_path / "0.safetensors")
    out = tmp_path / "out.gguf"
    options = {"output_format": "gguf-q8_0", "threads": threads, "total_buffer_size": 2**18}
    _average(tmp_path / "0.safetensors", output=out, **options)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert {name: tensor.tensor_type.name for name, tensor in found.items()} == {
        "a.weight": "Q8_0",
        "b.weight": "Q8_0",
        "a.bias": "F32",
        "conv.weight": "F32",
    }
    number = gguf.GGMLQuantizationType.Q8_0
    again = _average(out)
    for name in ("a.weight", "b.weight"):
        expected = gguf.quantize(_tensors(0)[name].numpy(), number)
        assert found[name].data.tobytes() == expected.tobytes()
        assert torch.equal(again[name], torch.from_numpy(gguf.dequantize(expected, number)))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_output_dtype_is_that_of_matrices(tmp_path: Path, dtype: str) -> None:
    save_file(_tensors(0), tmp_path / "0.safetensors")
    out = tmp_path / "out.gguf"
    _average(tmp_path / "0.safetensors", output=out, output_dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    wide = {"fp16": "F16", "bf16": "BF16"}[dtype]
    assert kinds == {"a.weight": wide, "b.weight": wide, "conv.weight": wide, "a.bias": "F32"}
    wanted = _average(tmp_path / "0.safetensors", output_dtype=dtype)
    assert all(torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in _average(out).items())


def test_float64_output_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    save_file(_tensors(0), tmp_path / "0.safetensors")
    with pytest.raises(OutputError, match="float64, which GGUF files do not hold; choose float32"):
        _average(tmp_path / "0.safetensors", output=tmp_path / "out.gguf", output_dtype="float64")
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]


def test_a_recipe_in_a_file_is_read_again(tmp_path: Path) -> None:
    save_file(_tensors(0), tmp_path / "0.safetensors")
    _average(tmp_path / "0.safetensors", output=tmp_path / "1.gguf")
    _average(tmp_path / "1.gguf", output=tmp_path / "2.gguf")
    recipe = gguf.GGUFReader(tmp_path / "2.gguf").fields["mecha.recipe"].contents()
    assert "1.gguf" in recipe
    assert "0.safetensors" not in recipe


@pytest.mark.parametrize("output_format", ["gguf", "gguf-q8_0"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", None])
def test_an_output_verifies_against_its_recipe(tmp_path: Path, output_format: str, dtype: str | None) -> None:
    models = []
    for seed in (0, 1):
        tensors = _tensors(seed)
        tensors |= {"half.weight": tensors["b.weight"].half(), "steps": torch.arange(3)}
        tensors["large.weight"] = torch.randn(600, 512, generator=torch.Generator().manual_seed(seed))
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        models.append(sd_mecha.model(tmp_path / f"{seed}.safetensors"))
    out = tmp_path / "out.gguf"
    sd_mecha.merge(sd_mecha.n_average(*models), output=out, output_dtype=dtype, output_format=output_format)
    report = sd_mecha.verify(out, against="embedded", sample=None)
    assert report.ok, report
    assert report.compared == 7
    place = {tensor.name: tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(out).tensors}
    raw = bytearray(out.read_bytes())
    raw[place["large.weight"] - 1] ^= 1
    out.write_bytes(raw)
    (problem,) = sd_mecha.verify(out, against="embedded", sample=None).problems
    assert problem.startswith("tensor 'large.weight' is not what the recipe makes: it differs in 1 of 307200 elements")
    assert problem.endswith("first element 307199")
    other = sd_mecha.weighted_sum(*models, alpha=0.4)
    assert len(sd_mecha.verify(out, against=other, sample=None).problems) == 6  # all but the whole numbers


def test_what_another_program_has_quantised_is_not_compared(tmp_path: Path) -> None:
    tensors = _tensors(0) | {"a.bias": torch.ones(64)}
    save_file(tensors, tmp_path / "0.safetensors")
    kinds = {"a.weight": "Q4_0", "b.weight": "Q8_0"}
    out = write_gguf(tmp_path / "out.gguf", tensors, kinds, keys={"mecha.dtypes": "float32"})
    report = sd_mecha.verify(out, against=sd_mecha.model(tmp_path / "0.safetensors"), sample=None)
    assert report.ok, report
    assert report.compared == 3
    assert "1 tensor in Q4_0, which other programs write, cannot be compared with the recipe" in report.notes


@pytest.mark.parametrize("told", ["nothing", "", "bfloat16 float32"])
def test_a_file_that_tells_nonsense_of_its_dtypes_is_read(tmp_path: Path, told: str) -> None:
    out = write_gguf(tmp_path / "out.gguf", _tensors(0), keys={"mecha.dtypes": told})
    assert sd_mecha.verify(out, against=sd_mecha.model(out), sample=None).ok
    sd_mecha.merge(sd_mecha.model(out), output=tmp_path / "out.safetensors")
    with sd_mecha.plan(sd_mecha.model(tmp_path / "out.safetensors")) as planned:
        assert "mecha.dtypes" not in planned.metadata()


def test_one_part_of_several_is_refused(tmp_path: Path) -> None:
    keys = {"split.count": 3, "split.no": 0, "split.tensors.count": 9}
    write_gguf(tmp_path / "a-00001-of-00003.gguf", {"w": torch.ones(2)}, keys=keys)
    with pytest.raises(FileFormatError, match="one of 3 parts and has 1 of 9 tensors; join them"):
        _average(tmp_path / "a-00001-of-00003.gguf")


def test_a_damaged_file_is_named_with_its_rule(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(file_of([], [info("w", (8,))], bytes(31)))
    with pytest.raises(FileFormatError, match=r"a\.gguf: tensor 'w' reaches to byte .* fetch it again"):
        _average(tmp_path / "a.gguf")
