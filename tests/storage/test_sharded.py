"""Models in several files: the index decides, and one that breaks a rule is refused before any tensor is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sd_mecha.errors import ChangedInputError, FileFormatError, ModelNotFoundError
from sd_mecha.extensions.model_formats import open_model
from sd_mecha.storage.contract import Reader
from sd_mecha.storage.folders import sharded
from sd_mecha.storage.folders.joined import JoinedReader, join_components
from sd_mecha.storage.folders.sharded import find_weights, is_index, is_known_weights, open_sharded
from sd_mecha.storage.locations import LocalLocation, Location
from sd_mecha.storage.memory import MemoryReader
from tests.storage.places import Unlisted
from tests.storage.support import read_bytes

NAME = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHTS = {"b": FIRST, "a": FIRST, "c": SECOND}


def shards(folder: Path, index: Any = None) -> Path:
    """Three tensors in two files, with an index (an object, or bytes), which is returned."""
    save_file({"a": torch.arange(4), "b": torch.ones(2)}, folder / FIRST, metadata={"format": "pt", "x": "1"})
    save_file({"c": torch.zeros(3)}, folder / SECOND)
    written = {"metadata": {"total_size": 52, "note": "kept"}, "weight_map": WEIGHTS} if index is None else index
    (folder / NAME).write_bytes(written if isinstance(written, bytes) else json.dumps(written).encode())
    return folder / NAME


def opened(index: Path) -> JoinedReader:
    return open_sharded(LocalLocation(index), open_model)


def test_all_tensors_of_all_files_are_read(tmp_path: Path) -> None:
    reader = opened(shards(tmp_path))
    assert set(reader.entries) == {"a", "b", "c"}
    assert list(reader.entries)[-1] == "c"  # files in order
    assert read_bytes(reader, "a") == torch.arange(4).numpy().tobytes()
    part = bytearray(8)
    reader.read_into("a", 16, memoryview(part))
    assert bytes(part) == torch.tensor([2]).numpy().tobytes()
    assert reader.metadata == {"format": "pt", "x": "1", "note": "kept"}
    assert reader.name == str(tmp_path / NAME)
    reader.close()


def test_an_index_at_an_address_leads_to_the_files_beside_it(tmp_path: Path) -> None:
    index = Unlisted(shards(tmp_path))
    reader = open_sharded(index, open_model)
    assert set(reader.entries) == {"a", "b", "c"}
    reader.close()
    found = find_weights(index.parent())
    assert found is not None
    assert found.basename == NAME


def test_what_the_index_does_not_name_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = shards(tmp_path, {"weight_map": {"a": FIRST, "c": SECOND}})
    with caplog.at_level(logging.WARNING, "sd_mecha"):
        opened(index).close()
        reader = opened(index)
    assert set(reader.entries) == {"a", "c"}
    assert len(caplog.records) == 1
    assert "1 tensors in its files are not in the index and are left out, such as 'b'" in caplog.text
    reader.close()


def test_shards_may_be_of_any_format(tmp_path: Path) -> None:
    index = shards(tmp_path)
    held: dict[str, Reader] = {
        FIRST: MemoryReader({"a": torch.ones(1), "b": torch.ones(1)}, "first"),
        SECOND: MemoryReader({"c": torch.full((1,), 7.0)}, "second"),
    }
    reader = open_sharded(LocalLocation(index), lambda location: held[location.basename])
    assert read_bytes(reader, "c") == torch.full((1,), 7.0).numpy().tobytes()
    reader.close()


@pytest.mark.parametrize("file", [FIRST, SECOND, NAME])
def test_a_change_of_any_file_is_noticed(tmp_path: Path, file: str) -> None:
    reader = opened(shards(tmp_path))
    reader.check_unchanged()
    before = reader.fingerprint
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(data + b" ")
    with pytest.raises(ChangedInputError, match=file.replace(".", r"\.")):
        reader.check_unchanged()
    reader.close()
    (tmp_path / file).write_bytes(data)
    again = opened(tmp_path / NAME)
    assert again.fingerprint != before
    again.close()


@pytest.mark.parametrize(
    ("index", "rule"),
    [
        ({}, "weight_map missing"),
        ({"weight_map": [1]}, "weight_map is not an object"),
        ({"weight_map": {"a": 3}}, "weight_map does not map to text: got 'a': 3"),
        ({"weight_map": {"a": FIRST, "z": SECOND}}, "shard lacks a tensor that the index gives it: 'z'"),
        ({"weight_map": {"c": FIRST}}, "shard lacks a tensor that the index gives it: 'c'"),
        ({"weight_map": {"a": "../x.safetensors"}}, "names a file '../x.safetensors'"),
        ({"weight_map": {"a": "../../etc/passwd"}}, "names a file '../../etc/passwd'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names a file '/etc/passwd'"),
        ({"weight_map": {"a": "x\\y"}}, "expected one within the folder"),
        ({"weight_map": {"a": ""}}, "expected one within the folder"),
        ({"weight_map": {"a": "."}}, "expected one within the folder"),
        ({"weight_map": {"a": f".//{FIRST}"}}, "expected one within the folder"),
        ({"weight_map": {"a": NAME}}, "is an index itself"),
        ({"weight_map": {"a": "inside"}}, "is a folder"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "names a key twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "names a key twice"),
        (b'{"metadata": NaN, "weight_map": {}}', "got NaN"),
        (b'{"weight_map": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"weight_map": {"a": "\xff"}}', "not valid UTF-8"),
        (b'{"weight_map": {', "not valid JSON"),
        (b"[]", "does not start with"),
        (b"", "does not start with"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: Any, rule: str) -> None:
    (tmp_path / "inside").mkdir()
    with pytest.raises(FileFormatError) as caught:
        opened(shards(tmp_path, index))
    assert rule in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "header" not in str(caught.value)


def test_a_byte_order_mark_and_white_space_mean_nothing(tmp_path: Path) -> None:
    index = shards(tmp_path, b"\xef\xbb\xbf\r\n " + json.dumps({"weight_map": WEIGHTS}).encode())
    reader = open_model(LocalLocation(index))
    assert set(reader.entries) == {"a", "b", "c"}
    reader.close()


def test_files_may_be_named_as_those_of_this_folder(tmp_path: Path) -> None:
    reader = opened(shards(tmp_path, {"weight_map": {"a": f"./{FIRST}", "b": FIRST, "c": f"./{SECOND}"}}))
    assert set(reader.entries) == {"a", "b", "c"}
    reader.close()


def test_a_path_that_leads_out_is_told_with_the_index_and_the_tensor(tmp_path: Path) -> None:
    index = shards(tmp_path, {"weight_map": {"a": FIRST, "b": "../x.safetensors", "c": "../x.safetensors"}})
    with pytest.raises(FileFormatError) as caught:
        opened(index)
    assert str(caught.value).startswith(f"{index}: tensor 'b': names a file '../x.safetensors'")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path)
    save_file({"c": torch.zeros(3), "a": torch.ones(1)}, tmp_path / SECOND)
    with pytest.raises(FileFormatError, match=f"tensor in two shards: 'a': got '{FIRST}' and '{SECOND}'"):
        opened(index)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(ModelNotFoundError, match=f"shard missing: the index names '{SECOND}'.*fetch it"):
        opened(index)


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / SECOND).unlink()
    (tmp_path / SECOND).symlink_to(SECOND)
    with pytest.raises(ModelNotFoundError, match=f"{SECOND}' is a link in a circle"):
        opened(index)


def test_a_shard_that_is_a_link_to_nothing_is_called_one(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / SECOND).unlink()
    (tmp_path / SECOND).symlink_to("gone")
    with pytest.raises(ModelNotFoundError, match=f"shard missing.*{SECOND}' is a link that leads nowhere, to 'gone'"):
        opened(index)


def test_an_index_of_too_many_values_is_refused_unparsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = shards(tmp_path, b'{"weight_map": {}, "metadata": [' + b"0," * 1_000_001 + b"0]}")
    with pytest.raises(FileFormatError, match=r"index too large.*1000000 values"):
        opened(index)
    monkeypatch.setattr(sharded, "MAX_INDEX", 1000)
    with pytest.raises(FileFormatError, match=r"index too large.*at most 1000"):
        opened(index)


def test_files_that_were_opened_are_closed_again_on_failure(tmp_path: Path) -> None:
    closed: list[str] = []

    class Watched(MemoryReader):
        def close(self) -> None:
            closed.append(self.name)

    opener: Callable[[Location], Reader] = lambda place: Watched({"other": torch.ones(1)}, place.basename)  # noqa: E731
    with pytest.raises(FileFormatError):
        open_sharded(LocalLocation(shards(tmp_path)), opener)
    assert closed == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", NAME, "pytorch_model.bin"], "model.safetensors"),
        ([NAME, "pytorch_model.bin"], NAME),
        (["pytorch_model.bin", "model.fp16.safetensors"], "pytorch_model.bin"),
        (["pytorch_model.bin.index.json", "readme.md"], "pytorch_model.bin.index.json"),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
         "diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["model.bf16.safetensors"], "model.bf16.safetensors"),
        (["diffusion_pytorch_model.non_ema.bin"], "diffusion_pytorch_model.non_ema.bin"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "model.fp16.safetensors"),
        (["model.bf16.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
        (["model.bf16.safetensors", "pytorch_model.bf16.bin"], "model.bf16.safetensors"),
        (["model.safetensors.index.fp8-e4m3.json", "model.fp8-e4m3-00001-of-00002.safetensors"],
         "model.safetensors.index.fp8-e4m3.json"),
        (["diffusion_pytorch_model.safetensors.bf16.index.json", "diffusion_pytorch_model-1-of-2.bf16.safetensors"],
         "diffusion_pytorch_model.safetensors.bf16.index.json"),
        (["model.bf16-00001-of-00002.safetensors", "model-00001-of-00002.bf16.safetensors"], None),
        (["config.json", "anything.safetensors"], "anything.safetensors"),
        (["anything.safetensors"], None),
        (["config.json", "one.safetensors", "other.safetensors"], None),
        ([], None),
    ],
)  # fmt: skip
def test_which_file_of_a_folder_is_its_model(tmp_path: Path, names: list[str], expected: str | None) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    found = find_weights(LocalLocation(tmp_path))
    assert (None if found is None else found.basename) == expected


def test_of_several_variants_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("model.non_ema.safetensors", "model.safetensors.index.bf16.json"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileFormatError) as caught:
        find_weights(LocalLocation(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: several variants of a model: got 'model.safetensors.index.bf16.json', "
        "'model.non_ema.safetensors', expected one; name the file or index, or keep one only"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.bf16-00001-of-00002.safetensors", True),
        ("model-00001-of-00002.bf16.safetensors", True),
        ("diffusion_pytorch_model.non_ema.bin", True),
        ("pytorch_model.bin.index.8-bit.json", True),
        ("diffusion_pytorch_model.safetensors.bf16.index.json", True),
        ("model_card.safetensors", False),
        ("model.a.b.c.safetensors", False),
        ("model.epoch5.safetensors", False),
        ("model.fp16_backup.safetensors", False),
        ("model.fp8_e4m3fn.safetensors", True),
    ],
)
def test_weights_of_the_usual_variants_are_known(name: str, expected: bool) -> None:
    assert is_known_weights(name) is expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("renamed", b'{"weight_map": {}}', True),
        (NAME, b'{"metadata": {"long": "text"}', True),
        ("renamed", b'\xef\xbb\xbf\r\n {"weight_map": {}}', True),
        ("model.safetensors.index.8-bit.json", b'{"metadata": {"long": "text"}', True),
        (NAME, b"<html>", False),
        ("config.json", b'{"model_type": "llama"}', False),
        ("model.safetensors", b'{\0\0\0\0\0\0\0{"weight_map": ', False),
    ],
)
def test_an_index_is_known_by_its_content(tmp_path: Path, name: str, content: bytes, expected: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_index(LocalLocation(tmp_path / name)) is expected


def test_components_are_shown_with_their_names_before_the_keys() -> None:
    parts: dict[str, Reader] = {
        "unet": MemoryReader({"w": torch.ones(1)}, "u"),
        "vae": MemoryReader({"w": torch.zeros(2)}, "v"),
    }
    reader = join_components("pipeline", parts)
    assert list(reader.entries) == ["unet.w", "vae.w"]
    assert reader.components == ("unet", "vae")
    assert read_bytes(reader, "unet.w") == torch.ones(1).numpy().tobytes()
    reader.close()
