"""Formats: finding them, and those written for sd-mecha 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sd_mecha.builtin.formats.safetensors import SafetensorsFormat
from sd_mecha.errors import DuplicateNameError, FileFormatError, ModelNotFoundError, UnknownFormatError
from sd_mecha.extensions import model_formats
from sd_mecha.extensions.model_formats import ModelFormat, register_model_format
from sd_mecha.extensions.registry import Registry
from sd_mecha.storage.contract import TensorEntry

EMPTY_SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch, no_plugins: None) -> None:
    """Only the safetensors format, and whatever the test adds."""
    monkeypatch.setattr(model_formats, "_registry", Registry("model format"))
    register_model_format(SafetensorsFormat)


def test_safetensors_is_known_by_its_name_and_by_its_content(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.SAFETENSORS", "c.ckpt", "d"):
        path = tmp_path / name
        path.write_bytes(EMPTY_SAFETENSORS)
        assert model_formats.find(path).identifier == "safetensors"
        assert model_formats.find(str(path)).reader(path).entries == {}


def test_a_broken_safetensors_file_is_reported_by_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"<html><body>please log in</body></html>")
    with pytest.raises(FileFormatError):
        model_formats.find(path).reader(path)


@pytest.mark.parametrize(
    ("content", "looks", "next_step"),
    [
        (b"PK\x03\x04....", "PyTorch checkpoint", "data.pkl"),
        (b"\x80\x02}q\x00.", "Python pickle", "torch.save"),
        (b"GGUF\x03\x00\x00\x00", "GGUF", "as a model"),
        (b"Salted__\x00\x01", "encrypted", "decrypt"),
        (b"\x1f\x8b\x08\x00", "compressed", "unpack"),
        (b"<!DOCTYPE html><html>", "web page", "download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS pointer", "git lfs pull"),
        (b"", "empty", "again"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "picture", "fetch the model"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "picture", "fetch the model"),
        (b"Entry not found\n", "a text, which begins with 'Entry not found'", "download the model again"),
        ("Zugang verweigert für ".encode() + "ü".encode() * 200, "begins with 'Zugang verweigert f", "again"),
        (b"\x00\x01random", "no known format", "check"),
        (b"random\x00\x01", "no known format", "check"),
    ],
)
def test_unknown_files_are_described(tmp_path: Path, content: bytes, looks: str, next_step: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(UnknownFormatError) as caught:
        model_formats.find(path)
    for text in (str(path), looks, next_step, "safetensors"):
        assert text in str(caught.value)


def test_directory_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a directory; name a model file"):
        model_formats.find(tmp_path)
    with pytest.raises(ModelNotFoundError):
        model_formats.find(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["config.json"], "a directory; name a model file in it"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "'model-00001-of-00002.safetensors', without their index 'model.safetensors.index.json'; fetch that",
        ),
        (["pytorch_model-00002-of-00002.bin"], "without their index 'pytorch_model.bin.index.json'"),
        (["model.fp16-00001-of-00002.safetensors"], "without their index 'model.safetensors.index.fp16.json'"),
        (["own-00001-of-00002.safetensors", "own.safetensors.index.json"], "a directory; name a model file in it"),
        (["__0_0.distcp", "__1_0.distcp"], "such as '__0_0.distcp', without '.metadata'"),
    ],
)
def test_a_directory_that_is_nearly_a_model(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UnknownFormatError) as caught:
        model_formats.find(tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("target", "what"), [("../blobs/1", "leads nowhere, to '../blobs/1'"), ("model.safetensors", "in a circle")]
)
def test_a_directory_whose_weights_are_a_link_that_leads_nowhere(tmp_path: Path, target: str, what: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(UnknownFormatError) as caught:
        model_formats.find(tmp_path)
    assert "model.safetensors' is a link" in str(caught.value)
    assert what in str(caught.value)


def test_a_path_that_is_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    for name, target, what in (("a", "gone", "leads nowhere, to 'gone'"), ("b", "b", "in a circle")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(ModelNotFoundError, match=what):
            model_formats.find(tmp_path / name)


def test_output_that_asks_for_no_format_is_safetensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("new.safetensors", "new"):
        assert model_formats.for_output(tmp_path / name).identifier == "safetensors"
    assert not caplog.records
    assert model_formats.for_output(tmp_path / "new.ckpt").identifier == "safetensors"
    assert "is written as safetensors, although its name ends in .ckpt" in caplog.text


def test_output_without_a_format_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_formats, "_registry", Registry("model format"))
    with pytest.raises(UnknownFormatError, match=r"ends in '\.ckpt'; use one of \(none known\)"):
        model_formats.for_output("new.ckpt")


class Plain(ModelFormat):
    suffixes = (".plain",)

    def matches(self, path: Path) -> bool:
        return path.name.endswith(".plain")


def test_registering() -> None:
    assert register_model_format(Plain, identifier="first") is Plain
    register_model_format(identifier="second")(Plain())

    @register_model_format
    def third() -> ModelFormat:
        return Plain()

    assert model_formats.resolve("first").identifier == "first"
    assert model_formats.resolve("third").identifier == "third"
    assert [f.identifier for f in model_formats.get_all()] == ["safetensors", "first", "second", "third"]
    with pytest.raises(DuplicateNameError):
        register_model_format(Plain(), identifier="first")
    with pytest.raises(KeyError, match="did you mean 'second'"):
        model_formats.resolve("secnd")


def test_registering_what_is_no_format() -> None:
    with pytest.raises(TypeError, match="matches, reader, writer"):
        register_model_format(object(), identifier="x")


def test_one_way_formats_say_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="writing only"):
        Plain().reader(tmp_path)
    with pytest.raises(UnknownFormatError, match="reading only"):
        Plain().writer(tmp_path)


def test_a_writer_without_requests_is_that_of_nothing_asked_for(tmp_path: Path) -> None:
    asked = []

    class Asking(Plain):
        def writer_for(self, path: Path, request: model_formats.OutputRequest) -> Any:
            asked.append((path, list(request.given())))
            return "a writer"

    found: Any = Asking().writer(tmp_path)
    assert found == "a writer"
    assert asked == [(tmp_path, [])]


class Legacy(ModelFormat):
    """As written for sd-mecha 1."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.config: Any = None
        self.recipe = ""

    def matches(self, path: Path) -> bool:
        return True

    def get_read_dict(self, path: Path, buffer_size: int) -> Any:
        return self.tensors

    def get_write_dict(self, path: Path, model_config: Any, mecha_recipe: str, buffer_size: int) -> Any:
        self.config, self.recipe = model_config, mecha_recipe
        return self.tensors


def test_legacy_reader(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    reader = Legacy({"a": tensor.T, "s": torch.tensor(True)}).reader(tmp_path)
    assert reader.entries == {"a": TensorEntry((4, 3), torch.float32), "s": TensorEntry((), torch.bool)}
    buffer = bytearray(8)
    reader.read_into("a", 4, memoryview(buffer))
    assert torch.frombuffer(buffer, dtype=torch.float32).tolist() == [4.0, 8.0]
    flag = bytearray(1)
    reader.read_into("s", 0, memoryview(flag))
    assert flag == b"\x01"
    with pytest.raises(ValueError, match="outside tensor 'a'"):
        reader.read_into("a", 44, memoryview(buffer))


def test_legacy_writer(tmp_path: Path) -> None:
    legacy = Legacy({})
    writer = legacy.writer(tmp_path)
    entries = {
        "a": TensorEntry((4,), torch.int16),
        "dropped": TensorEntry((4,), torch.int16),
        "none": TensorEntry((0, 2), torch.float32),
    }
    writer.declare(entries, {"mecha_recipe": "text"})
    writer.write("a", 4, memoryview(b"\x03\x00\x04\x00"))
    assert "a" not in legacy.tensors
    writer.write("a", 0, memoryview(b"\x01\x00\x02\x00"))
    assert legacy.tensors["a"].tolist() == [1, 2, 3, 4]
    writer.write("dropped", 0, memoryview(b"\x01\x00"))
    writer.drop("dropped")
    writer.commit()
    assert list(legacy.tensors) == ["a", "none"]
    assert legacy.tensors["none"].shape == (0, 2)
    assert legacy.recipe == "text"
    assert legacy.config.keys()["a"].shape == (4,)
