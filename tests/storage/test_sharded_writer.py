"""Folders of safetensors files: how tensors are distributed, what the index says, and what stays after a failure."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sd_mecha.errors import OutputError
from sd_mecha.extensions.model_formats import open_model
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.folders import output_folder, sharded_writer
from sd_mecha.storage.folders.sharded import open_sharded
from sd_mecha.storage.folders.sharded_writer import Part, ShardedWriter
from sd_mecha.storage.locations import LocalLocation
from sd_mecha.storage.output_file import OutputFile
from tests.storage.support import entries_of

TENSORS = {
    "small": torch.arange(4, dtype=torch.float32),  # 16 bytes
    "large": torch.arange(20, dtype=torch.float32),  # 80
    "x": torch.ones(8, dtype=torch.float16),  # 16
    "y": torch.zeros(2, dtype=torch.float64),  # 16
    "scalar": torch.tensor(3, dtype=torch.int64),  # 8
}
METADATA = {"format": "pt", "mecha_recipe": "text"}
INDEX = "model.safetensors.index.json"


def declared(path: Path, tensors: dict[str, torch.Tensor] = TENSORS, **options: Any) -> ShardedWriter:
    writer = ShardedWriter(path, **options)
    writer.declare(entries_of(tensors), METADATA)
    return writer


def fill(writer: ShardedWriter, tensors: dict[str, torch.Tensor] = TENSORS) -> None:
    for name, tensor in reversed(tensors.items()):
        writer.write(name, 0, byte_view(tensor))


def written(path: Path, **options: Any) -> Path:
    writer = declared(path, **options)
    fill(writer)
    writer.commit()
    return path


def files(path: Path) -> dict[str, list[str]]:
    return {file.name: sorted(load_file(file)) for file in sorted(path.glob("*.safetensors"))}


def test_files_are_filled_in_order_up_to_their_size(tmp_path: Path) -> None:
    out = written(tmp_path / "out", shard_size=40)
    assert files(out) == {
        "model-00001-of-00003.safetensors": ["small"],
        "model-00002-of-00003.safetensors": ["large"],  # larger than a file may be: alone
        "model-00003-of-00003.safetensors": ["scalar", "x", "y"],
    }
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"] == {**METADATA, "total_size": 136}
    assert index["weight_map"] == {name: file for file, names in files(out).items() for name in names}
    for file in files(out):
        for name, tensor in load_file(out / file).items():
            assert torch.equal(tensor, TENSORS[name])
    assert os.listdir(tmp_path) == ["out"]


def test_what_fits_into_one_file_needs_no_index(tmp_path: Path) -> None:
    assert files(written(tmp_path / "out")) == {"model.safetensors": sorted(TENSORS)}
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_only_the_first_file_carries_the_recipe(tmp_path: Path) -> None:
    out = written(tmp_path / "out", shard_size=40)
    sizes = [b"mecha_recipe" in (out / file).read_bytes() for file in files(out)]
    assert sizes == [True, False, False]
    assert all(b'"format":"pt"' in (out / file).read_bytes() for file in files(out))


def test_a_long_recipe_is_only_in_the_first_file(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path / "out", shard_size=40)
    writer.declare(entries_of(TENSORS), {"mecha_recipe": "x" * 2_000_000})
    fill(writer)
    writer.commit()
    assert (tmp_path / "out" / INDEX).stat().st_size < 10_000
    reader = open_sharded(LocalLocation(tmp_path / "out" / INDEX), open_model)
    assert reader.metadata["mecha_recipe"] == "x" * 2_000_000
    reader.close()


def test_a_new_number_of_files_replaces_the_old_ones(tmp_path: Path) -> None:
    out = written(tmp_path / "out", shard_size=40)
    (out / "lora.safetensors").write_bytes(b"mine")
    written(out, shard_size=100)
    assert {p.name for p in out.iterdir()} == {
        INDEX,
        "lora.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    written(out)
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "lora.safetensors"}


OLD_WEIGHTS = [
    "model.safetensors",
    "model.fp16.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "model-00001-of-00002.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.safetensors.index.json",
]


@pytest.mark.parametrize("sub", ["", "unet/"])
def test_old_weights_go_under_whatever_name_a_library_looks_for_them(tmp_path: Path, sub: str) -> None:
    out = tmp_path / "out"
    (out / "unet").mkdir(parents=True)
    (out / "other").mkdir()
    kept = [f"{sub}lora.safetensors", f"{sub}model.txt", "config.json", "other/model.safetensors"]
    for name in [*kept, *(sub + name for name in OLD_WEIGHTS)]:
        (out / name).write_bytes(b"old")
    written(out, parts=[Part("new", sub.rstrip("/"))])
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {*kept, f"{sub}new.safetensors"}


def test_dropped_tensors_are_in_no_file_and_not_in_the_index(tmp_path: Path) -> None:
    writer = declared(tmp_path / "out", shard_size=40)
    kept = {name: tensor for name, tensor in TENSORS.items() if name != "x"}
    fill(writer, kept)
    writer.drop("x")
    writer.commit()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == kept.keys()
    assert index["metadata"]["total_size"] == 120
    assert sorted(name for names in files(tmp_path / "out").values() for name in names) == sorted(kept)


def test_parts_have_folders_and_names_of_their_own(tmp_path: Path) -> None:
    parts = [Part("diffusion_pytorch_model", "unet", "unet."), Part("model", "text", "text.")]
    tensors = {"unet.a": torch.ones(4), "text.b": torch.zeros(4), "unet.c": torch.ones(4)}
    writer = declared(tmp_path / "out", tensors, parts=parts, shard_size=16)
    fill(writer, tensors)
    writer.commit()
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert found == [
        "text/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert load_file(tmp_path / "out" / "text" / "model.safetensors").keys() == {"b"}


def test_a_tensor_of_no_part_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"'vae\.b' belongs to no part.*it has unet\."):
        declared(tmp_path / "out", {"vae.b": torch.ones(1)}, parts=[Part("model", "unet", "unet.")])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["declared", "partly written", "side files"])
def test_a_failure_leaves_nothing(tmp_path: Path, when: str) -> None:
    def broken(entries: object) -> Any:
        yield "config.json", b"{}"
        raise OutputError("no more")

    if when == "side files":
        with pytest.raises(OutputError, match="no more"):
            declared(tmp_path / "out", side_files=broken)
    else:
        writer = declared(tmp_path / "out", shard_size=40)
        if when == "partly written":
            writer.write("large", 0, byte_view(TENSORS["large"]))
            with pytest.raises(OutputError, match="incomplete"):
                writer.commit()
        writer.abort()
    assert os.listdir(tmp_path) == []


def test_space_for_all_files_is_reserved_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = {name: torch.empty(1 << 50, dtype=torch.uint8, device="meta") for name in "ab"}
    with pytest.raises(OutputError, match="has no room"):
        declared(tmp_path / "out", huge, shard_size=1 << 50)
    assert os.listdir(tmp_path) == []

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "_reserve", full)
        with pytest.raises(OutputError, match=r"output '.*/out' has no room for 136 bytes: No space left.*; free some"):
            declared(tmp_path / "out", shard_size=40)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(sharded_writer, "descriptor_limit", lambda: 2)
    with pytest.raises(OutputError, match="would be 3, and at most 2 can be written at once; choose a larger"):
        declared(tmp_path / "out", shard_size=40)
    assert os.listdir(tmp_path) == []


def test_a_resumed_folder_is_the_same_as_one_made_at_once(tmp_path: Path) -> None:
    writer = declared(tmp_path / "out", shard_size=40, resume="recipe")
    for name in ("large", "x"):
        writer.write(name, 0, byte_view(TENSORS[name]))
        writer.finished(name)
    writer.abort()
    assert not (tmp_path / "out").exists()
    config = [("config.json", b"")]
    again = declared(tmp_path / "out", shard_size=40, resume="recipe", side_files=lambda entries: config)
    assert again.completed == {"large", "x"}
    back = bytearray(80)
    again.read_back("large", 0, memoryview(back))
    assert bytes(back) == bytes(byte_view(TENSORS["large"]))
    fill(again, {name: tensor for name, tensor in TENSORS.items() if name not in again.completed})
    again.commit()
    at_once = written(tmp_path / "other", shard_size=40)
    assert (tmp_path / "out" / "config.json").exists()
    for file in [*files(at_once), INDEX]:
        assert (tmp_path / "out" / file).read_bytes() == (at_once / file).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_what_was_dropped_before_an_interruption_stays_out(tmp_path: Path) -> None:
    writer = declared(tmp_path / "out", shard_size=40, resume="recipe")
    writer.write("large", 0, byte_view(TENSORS["large"]))
    writer.finished("large")
    writer.drop("x")
    writer.abort()
    again = declared(tmp_path / "out", shard_size=40, resume="recipe")
    assert again.completed == {"large", "x"}
    assert again.dropped == {"x"}
    fill(again, {name: tensor for name, tensor in TENSORS.items() if name not in again.completed})
    again.commit()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == TENSORS.keys() - {"x"}
    assert sorted(name for names in files(tmp_path / "out").values() for name in names) == sorted(index["weight_map"])


@pytest.mark.skipif(not capabilities.exchange, reason="folders cannot change places here")
@pytest.mark.parametrize("done", [False, True])
def test_the_old_folder_is_not_taken_for_one_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """Killed around the moment in which both change places: the temporary name may lead to the old one.

    Which differs where no sample of the journal looks.
    """
    tensors = {name: torch.arange(100_000, dtype=torch.int32) for name in "ab"}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    before["a"][15_000] = before["b"][15_000] = -1
    out = tmp_path / "out"
    for content in (before, tensors):
        writer = declared(out, tensors, shard_size=400_000, resume="recipe")
        fill(writer, content)
        for name in content:
            writer.finished(name)
        if content is before:
            writer.commit()
    exchange = output_folder._exchange

    def killed(one: str, other: str) -> bool:
        if done:
            exchange(one, other)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "_exchange", killed)
        patch.setattr(output_folder.OutputFolder, "_clean_up", lambda self, replaced: None)
        patch.setattr(ShardedWriter, "abort", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            writer.commit()
    os.close(writer._folder._lock)
    again = declared(out, tensors, shard_size=400_000, resume="recipe")
    assert again.completed == (frozenset() if done else tensors.keys())
    fill(again, {name: tensor for name, tensor in tensors.items() if name not in again.completed})
    again.commit()
    found = {name: tensor for file in files(out) for name, tensor in load_file(out / file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert os.listdir(tmp_path) == ["out"]


def test_another_recipe_does_not_go_on_with_what_was_left(tmp_path: Path) -> None:
    writer = declared(tmp_path / "out", shard_size=40, resume="recipe")
    writer.write("large", 0, byte_view(TENSORS["large"]))
    writer.finished("large")
    writer.abort()
    again = declared(tmp_path / "out", shard_size=40, resume="another")
    assert not again.completed
    again.abort()
    assert os.listdir(tmp_path) == []
