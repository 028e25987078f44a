"""Checksums in the metadata of outputs: of what was written, and of what was read for it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.checksums import CHECKSUMS_KEY, Checksums
from sd_mecha.errors import FileFormatError, OptionError, UnknownFormatError
from sd_mecha.storage.gguf import kinds
from sd_mecha.storage.output_file import OutputFile


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def checksums_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()[CHECKSUMS_KEY])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Two files, `a` and `b`, of which `b` has a tensor more; one tensor has more bytes than are read at once."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in "ab":
        tensors = {
            "large": torch.randn(700, 800, generator=generator),
            "half": torch.randn(5, generator=generator).half(),
            "empty": torch.empty(0, 3),
            "steps": torch.tensor(7),
            'odd "name" é': torch.randn((), generator=generator),
        }
        found[name] = tensors | ({"other": torch.ones(3)} if name == "b" else {})
        save_file(found[name], tmp_path / f"{name}.safetensors", {"format": "pt", "title": name})
    return found


def recipe(tmp_path: Path) -> Any:
    return sd_mecha.weighted_sum(
        sd_mecha.model(tmp_path / "a.safetensors"), sd_mecha.model(tmp_path / "b.safetensors"), alpha=0.25
    )


@pytest.mark.parametrize("threads", [0, 3])
def test_every_tensor_read_and_written_has_one(
    tmp_path: Path, models: dict[str, dict[str, torch.Tensor]], threads: int
) -> None:
    out = tmp_path / "out.safetensors"
    sd_mecha.merge(recipe(tmp_path), output=out, checksums=True, threads=threads)
    found = checksums_of(out)
    assert found["algorithm"] == "sha256"
    assert found["output"] == {key: sha256(tensor) for key, tensor in load_file(out).items()}
    assert list(found["inputs"]) == [(tmp_path / f"{name}.safetensors").as_posix() for name in "ab"]
    for name, sums in zip("ab", found["inputs"].values(), strict=True):
        read = models["a"].keys() - ({"steps"} if name == "b" else set())  # integers are those of the first model
        assert sums.keys() - {"steps"} == read - {"steps"}
        assert sums == {key: sha256(models[name][key]) for key in sums}


def test_the_tensors_are_those_of_a_merge_without_them(
    tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]
) -> None:
    for name, checksums in (("plain", False), ("checked", True)):
        sd_mecha.merge(recipe(tmp_path), output=tmp_path / f"{name}.safetensors", checksums=checksums)
    plain, checked = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "checked"))
    assert plain.keys() == checked.keys()
    assert all(torch.equal(plain[key], checked[key]) for key in plain)
    with safe_open(tmp_path / "checked.safetensors", "pt") as file:
        assert file.metadata()["title"] == "a"
        assert "mecha_recipe" in file.metadata()


def test_those_of_an_input_do_not_travel(tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    sd_mecha.merge(recipe(tmp_path), output=tmp_path / "c.safetensors", checksums=True)
    sd_mecha.merge(sd_mecha.model(tmp_path / "c.safetensors"), output=tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        assert CHECKSUMS_KEY not in file.metadata()


def test_dropped_tensors_have_none(tmp_path: Path) -> None:
    tensors = {"nan": torch.full((600, 600), torch.nan), "w": torch.ones(3), "z": torch.arange(4.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    sd_mecha.merge(sd_mecha.model(tmp_path / "a.safetensors"), output=out, checksums=True)
    written = load_file(out)
    assert written.keys() == {"w", "z"}
    assert checksums_of(out)["output"] == {key: sha256(tensor) for key, tensor in written.items()}
    assert out.stat().st_size < 600 * 600


def test_several_outputs_have_their_own(tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    a, b = (sd_mecha.model(tmp_path / f"{name}.safetensors") for name in "ab")
    sd_mecha.merge_many({tmp_path / "x.safetensors": a, tmp_path / "y.safetensors": b}, checksums=True)
    assert list(checksums_of(tmp_path / "x.safetensors")["inputs"]) == [(tmp_path / "a.safetensors").as_posix()]
    assert "other" in checksums_of(tmp_path / "y.safetensors")["output"]


def test_models_in_memory_are_told_apart() -> None:
    models = [{"w": torch.full((2,), value)} for value in (1.0, 2.0)]
    merged = sd_mecha.merge(sd_mecha.n_average(*map(sd_mecha.model, models)), checksums=True)
    found = Checksums.from_text(merged["__metadata__"][CHECKSUMS_KEY], "here")
    assert found.output == {"w": sha256(merged["w"])}
    assert found.inputs == {
        "in-memory model": {"w": sha256(models[0]["w"])},
        "in-memory model (2)": {"w": sha256(models[1]["w"])},
    }


def test_scaled_fp8_has_them_of_what_is_in_the_file(tmp_path: Path) -> None:
    save_file({"blocks.0.weight": torch.randn(8, 8), "norm": torch.ones(8)}, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    sd_mecha.merge(sd_mecha.model(tmp_path / "a.safetensors"), output=out, checksums=True, scaled_fp8=True)
    written = load_file(out)
    assert "blocks.0.scale_weight" in written
    assert checksums_of(out)["output"] == {key: sha256(tensor) for key, tensor in written.items()}


def test_shards_have_them(tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    sd_mecha.merge(recipe(tmp_path), output=tmp_path / "folder", checksums=True, shard_size=1000)
    report = sd_mecha.verify(tmp_path / "folder")
    assert report.ok, report
    assert f"the checksums of {report.tensors} tensors agree" in report.notes


class Interrupted:
    """A progress bar that stops the merge after some tensors."""

    def __init__(self, total: int, desc: str) -> None:
        self.count = 0

    def __enter__(self) -> Interrupted:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def update(self) -> None:
        self.count += 1
        if self.count == 3:
            raise KeyboardInterrupt


def test_a_resumed_merge_has_the_same(tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    save_file(models["a"] | {"nan": torch.full((3,), torch.nan)}, tmp_path / "a.safetensors")
    wanted, out = tmp_path / "wanted.safetensors", tmp_path / "out.safetensors"
    model = sd_mecha.model(tmp_path / "a.safetensors")
    sd_mecha.merge(model, output=wanted, checksums=True)
    with pytest.raises(KeyboardInterrupt):
        sd_mecha.merge(model, output=out, checksums=True, resume=True, threads=0, tqdm=Interrupted)
    assert not out.exists()
    sd_mecha.merge(model, output=out, checksums=True, resume=True)
    assert out.read_bytes() == wanted.read_bytes()


@pytest.fixture
def mixed(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A file `m` of everything that GGUF stores in its own way, and a tensor that the output lacks."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(700, 800, generator=generator),
        "half": torch.randn(6, 64, generator=generator).half(),
        "brain": torch.randn(2, 33, generator=generator).bfloat16(),
        "bias": torch.randn(5, generator=generator).half(),
        "video": torch.randn(2, 1, 3, 2, 32, generator=generator),
        "empty": torch.empty(0, 32),
        "nan": torch.full((64, 64), torch.nan),
        "scalar": torch.tensor(2.5).bfloat16(),
        "steps": torch.arange(3),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    return tensors


GGUF = pytest.mark.parametrize("output_format", ["gguf", "gguf-q8_0"])


@GGUF
@pytest.mark.parametrize("threads", [0, 2])
def test_gguf_files_have_them_of_what_is_read(
    tmp_path: Path, mixed: dict[str, torch.Tensor], output_format: str, threads: int
) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "out.gguf"
    options: dict[str, Any] = {"output_format": output_format, "output_dtype": None, "threads": threads}
    sd_mecha.merge(sd_mecha.model(tmp_path / "m.safetensors"), output=out, checksums=True, **options)
    reader = gguf.GGUFReader(out)
    found = json.loads(reader.fields["mecha.checksums"].contents())
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert stored.keys() == mixed.keys() - {"nan"}
    quantised = {name for name, tensor in stored.items() if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0}
    assert quantised == ({"large", "half", "video", "empty"} if output_format == "gguf-q8_0" else set())
    values = {
        name: gguf.dequantize(tensor.data, tensor.tensor_type) if name in quantised else tensor.data
        for name, tensor in stored.items()
    }
    assert found["output"] == {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in values.items()}
    assert values["bias"].dtype == values["scalar"].dtype == "float32"
    assert found["inputs"] == {
        (tmp_path / "m.safetensors").as_posix(): {name: sha256(tensor) for name, tensor in mixed.items()}
    }
    report = sd_mecha.verify(out, against="embedded", sample=None)
    assert report.ok, report
    assert "the checksums of 8 tensors agree" in report.notes


@GGUF
def test_a_flipped_bit_of_a_gguf_file_is_found(
    tmp_path: Path, mixed: dict[str, torch.Tensor], output_format: str
) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "out.gguf"
    model = sd_mecha.model(tmp_path / "m.safetensors")
    sd_mecha.merge(model, output=out, output_format=output_format, checksums=True)
    place = {tensor.name: tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(out).tensors}
    raw = bytearray(out.read_bytes())
    raw[place["large"] - 1] ^= 1
    out.write_bytes(raw)
    assert sd_mecha.verify(out).problems == ["tensor 'large' is not what was written: its checksum differs"]


@GGUF
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("is_moved", [False, True])
def test_a_resumed_gguf_file_has_the_same(
    tmp_path: Path,
    mixed: dict[str, torch.Tensor],
    output_format: str,
    threads: int,
    is_moved: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the header has shrunk by what is dropped, and tensors have moved to where it ends."""
    if output_format == "gguf-q8_0":
        pytest.importorskip("gguf")
    wanted, out = tmp_path / "wanted.gguf", tmp_path / "out.gguf"
    model = sd_mecha.model(tmp_path / "m.safetensors")
    options: dict[str, Any] = {"output_format": output_format, "checksums": True}
    sd_mecha.merge(model, output=wanted, **options)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    progress = None if is_moved else Interrupted
    with monkeypatch.context() as patch:
        if is_moved:
            patch.setattr(OutputFile, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sd_mecha.merge(model, output=out, resume=True, threads=threads, tqdm=progress, **options)
    assert not out.exists()
    sd_mecha.merge(model, output=out, resume=True, threads=threads, **options)
    assert out.read_bytes() == wanted.read_bytes()


def test_those_of_a_gguf_file_do_not_travel(tmp_path: Path, mixed: dict[str, torch.Tensor]) -> None:
    sd_mecha.merge(sd_mecha.model(tmp_path / "m.safetensors"), output=tmp_path / "a.gguf", checksums=True)
    sd_mecha.merge(sd_mecha.model(tmp_path / "a.gguf"), output=tmp_path / "b.gguf")
    assert "it has no checksums" in sd_mecha.verify(tmp_path / "b.gguf").notes


def test_those_of_many_tensors_are_found_in_a_gguf_file(tmp_path: Path) -> None:
    sd_mecha.merge(
        sd_mecha.model({str(i): torch.ones(1) for i in range(600)}), output=tmp_path / "a.gguf", checksums=True
    )
    assert "the checksums of 600 tensors agree" in sd_mecha.verify(tmp_path / "a.gguf").notes


def test_values_that_nothing_here_reads_are_refused_before_they_are_made(
    tmp_path: Path, mixed: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds._quantised.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    model, out = sd_mecha.model(tmp_path / "m.safetensors"), tmp_path / "out.gguf"
    with pytest.raises(UnknownFormatError, match=r"out\.gguf': tensor '.+' is quantised, .* pip install"):
        sd_mecha.merge(model, output=out, output_format="gguf-q8_0", checksums=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_an_output_without_room_for_them_is_refused() -> None:
    model = sd_mecha.model({"w": torch.ones(2, 2)})
    with pytest.raises(OptionError, match="checksums=True: this output has no metadata"):
        sd_mecha.merge(model, output=torch.nn.ParameterDict({"w": torch.zeros(2, 2)}), checksums=True)
    with pytest.raises(OptionError, match="checksums needs an output"):
        next(sd_mecha.stream(model, checksums=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "does not start with"),
        ('{"algorithm": "md5", "output": {}, "inputs": {}}', "algorithm is 'md5'"),
        ('{"algorithm": "sha256", "output": {"w": 1}, "inputs": {}}', "expected keys and their checksums"),
        ('{"algorithm": "sha256", "output": {}, "inputs": {"a": "b"}}', "expected keys and their checksums"),
        ('{"algorithm": "sha256", "output": {}}', "expected keys and their checksums"),
    ],
)
def test_malformed_checksums_are_refused(text: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Checksums.from_text(text, "m.safetensors")
