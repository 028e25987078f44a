"""Models in folders: the same result as from one file, and what stands in the way is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sd_mecha
from sd_mecha.errors import FileFormatError, OptionError, OutputError, UnknownFormatError
from sd_mecha.storage.folders import side_files
from tests.formats.hugging import averaged, config_of, stored

CONFIG = {"model_type": "tiny", "torch_dtype": "float32"}
INDEX = "model.safetensors.index.json"


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"layers.{number}.weight": torch.full((2, 8), value + number) for number in range(6)}


def folder(path: Path, value: float, count: int = 3) -> Path:
    """A model of six matrices in so many files, with a config."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    index = {}
    names = list(tensors(value))
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors(value)[name] for name in names[number::count]}
        save_file(part, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return folder(tmp_path / "a", 0.0), folder(tmp_path / "b", 4.0, count=2)


def listing(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("threads", [0, 2])
def test_folders_merge_to_the_same_as_single_files(two: tuple[Path, Path], tmp_path: Path, threads: int) -> None:
    single = []
    for path, value in zip(two, (0.0, 4.0), strict=True):
        save_file(tensors(value), tmp_path / f"{path.name}.safetensors")
        single.append(tmp_path / f"{path.name}.safetensors")
    expected = averaged(*single)
    averaged(*two, output=tmp_path / "out", shard_size=70, threads=threads)
    mixed = averaged(two[0], single[1])
    named = averaged(two[0] / INDEX, two[1] / INDEX)
    for found in (averaged(*two), stored(tmp_path / "out"), mixed, named, averaged(tmp_path / "out")):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_files_of_pytorch_may_be_the_shards(two: tuple[Path, Path], tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    names = list(tensors(4.0))
    index = {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors(4.0)[name] for name in part}, pickled / file)
        index |= dict.fromkeys(part, file)
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    found, expected = averaged(two[0], pickled), averaged(*two)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("ask", ["slash", "existing", "shard_size", "format"])
def test_how_a_folder_is_asked_for(two: tuple[Path, Path], tmp_path: Path, ask: str) -> None:
    options: dict[str, Any] = {"output": tmp_path / "out"}
    if ask == "slash":
        options["output"] = f"{tmp_path}/out/"
    elif ask == "existing":
        (tmp_path / "out").mkdir()
    elif ask == "shard_size":
        options["shard_size"] = "1GB"
    else:
        options["output_format"] = "huggingface"
    averaged(*two, **options)
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert config_of(tmp_path / "out")["torch_dtype"] == "float16"


def test_a_model_may_be_replaced_by_what_is_made_of_it(two: tuple[Path, Path], tmp_path: Path) -> None:
    expected = averaged(*two)
    (two[0] / "notes.md").write_text("mine")
    averaged(*two, output=two[0], shard_size=100)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in stored(two[0]).items())
    assert (two[0] / "notes.md").read_text() == "mine"
    assert len(listing(two[0])) == 2 + 1 + 1 + 2  # config and tokenizer, notes, index, files


def test_tensors_from_memory_have_no_config_to_go_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sd_mecha.merge(sd_mecha.model(tensors(1.0)), output=f"{tmp_path}/out/", tqdm=None)
    assert listing(tmp_path / "out") == ["model.safetensors"]
    assert "is written without a config.json" in caplog.text


def test_a_resumed_merge_is_the_same_as_one_at_once(two: tuple[Path, Path], tmp_path: Path) -> None:
    averaged(*two, output=tmp_path / "at once", shard_size=70)
    averaged(*two, output=tmp_path / "out", shard_size=70, resume=True)
    assert listing(tmp_path / "out") == listing(tmp_path / "at once")
    for name in listing(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "at once", "b", "out"]


def test_a_quantised_config_is_not_kept_for_plain_floats(two: tuple[Path, Path], tmp_path: Path) -> None:
    (two[0] / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "fp8"}}))
    averaged(*two, output=f"{tmp_path}/out/")
    assert config_of(tmp_path / "out") == {**CONFIG, "torch_dtype": "float16"}


def test_large_hidden_and_odd_files_stay_behind(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(side_files, "MAX_SIDE_FILE", 500)
    for name in ("huge.txt", ".hidden", "pytorch_model.bin", "events.log:1", "LICENSE"):
        (two[0] / name).write_bytes(b"x" * (501 if name == "huge.txt" else 1))
    averaged(*two, output=f"{tmp_path}/out/")
    assert listing(tmp_path / "out") == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert "huge.txt: has 501 bytes and does not go along" in caplog.text


def test_a_config_that_is_no_json_goes_along_as_it_is(two: tuple[Path, Path], tmp_path: Path) -> None:
    (two[0] / "config.json").write_text("{nonsense")
    averaged(*two, output=f"{tmp_path}/out/")
    assert (tmp_path / "out" / "config.json").read_text() == "{nonsense"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"", "empty file"),
    ],
)
def test_a_file_that_is_no_model_is_named(two: tuple[Path, Path], content: bytes, what: str) -> None:
    file = two[0] / "model-00002-of-00003.safetensors"
    file.write_bytes(content)
    with pytest.raises((FileFormatError, UnknownFormatError), match=f"model-00002-of-00003.safetensors.*{what}"):
        averaged(*two)


def test_a_file_that_was_not_downloaded_to_its_end_is_named(two: tuple[Path, Path]) -> None:
    file = two[0] / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FileFormatError, match=r"model-00002-of-00003\.safetensors.*truncated"):
        averaged(*two)


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UnknownFormatError, match="a directory; name a model file in it"):
        averaged(tmp_path)


def test_a_folder_of_other_things_is_not_written_into(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="something else than a model"):
        averaged(*two, output=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_one_file_has_no_side_files(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="side_files"):
        averaged(*two, output=tmp_path / "x.safetensors", side_files=two[0])
