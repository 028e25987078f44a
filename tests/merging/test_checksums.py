"""Checksums in the metadata of outputs: of what was written, and of what was read for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.checksums import CHECKSUMS_KEY, Checksums
from sd_mecha.errors import FileFormatError, OptionError


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


def test_an_output_without_room_for_them_is_refused(tmp_path: Path) -> None:
    model = sd_mecha.model({"w": torch.ones(2, 2)})
    with pytest.raises(OptionError, match=r"checksums: .*name an output that ends in \.safetensors"):
        sd_mecha.merge(model, output=tmp_path / "out.gguf", checksums=True)
    with pytest.raises(OptionError, match="checksums needs an output"):
        next(sd_mecha.stream(model, checksums=True))
    assert not list(tmp_path.iterdir())


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
