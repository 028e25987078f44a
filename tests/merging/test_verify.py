"""Verifying files: each kind of damage is found, and sound files pass."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.errors import ModelNotFoundError, OptionError
from sd_mecha.verifying import Report

KEYS = [f"layers.{i}.{name}" for i in range(10) for name in ("weight", "bias")]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (16, 24), "bias": (16,)}
    found = {key: torch.randn(shapes[key.rpartition(".")[2]], generator=generator) for key in KEYS}
    return found | {"steps": torch.tensor(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models and what they were merged to, with checksums."""
    for seed, name in enumerate("ab"):
        save_file(tensors(seed), tmp_path / f"{name}.safetensors")
    sd_mecha.merge(recipe(tmp_path), output=tmp_path / "out.safetensors", checksums=True)
    return tmp_path


def recipe(folder: Path, alpha: float = 0.25) -> Any:
    a, b = (sd_mecha.model(folder / f"{name}.safetensors") for name in "ab")
    return sd_mecha.weighted_sum(a, b, alpha=alpha)


def rewritten(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """The output with other tensors, as another program would write it."""
    path = folder / "changed.safetensors"
    found = load_file(folder / "out.safetensors") | changes
    save_file({key: value for key, value in found.items() if value is not None}, path)
    return path


def flip(path: Path, key: str) -> None:
    """Change one bit of a tensor."""
    raw = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    place = bytes(raw[8 : 8 + size]).index(f'"{key}"'.encode())
    offset = int(bytes(raw[place : 8 + size]).partition(b'"data_offsets":[')[2].partition(b",")[0])
    raw[8 + size + offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("sample", [5, None])
def test_a_sound_file_passes(folder: Path, threads: int, sample: int | None) -> None:
    for against in (recipe(folder), "embedded"):
        report = sd_mecha.verify(folder / "out.safetensors", against=against, sample=sample, threads=threads)
        assert report.ok, report
        assert (report.tensors, report.compared) == (21, sample or 21)
        assert "the checksums of 21 tensors agree" in report.notes
        assert [note for note in report.notes if "was compared" in note and "not" not in note]
        assert "sound" in str(report)


def test_a_recipe_file_may_be_given(folder: Path) -> None:
    sd_mecha.serialize(recipe(folder), output=folder / "r.mecha")
    assert sd_mecha.verify(folder / "out.safetensors", against=folder / "r.mecha").ok


class TestDamage:
    def test_a_flipped_bit_is_found_by_its_checksum(self, folder: Path) -> None:
        flip(folder / "out.safetensors", "layers.3.bias")
        report = sd_mecha.verify(folder / "out.safetensors")
        assert report.problems == ["tensor 'layers.3.bias' is not what was written: its checksum differs"]
        assert "the checksums of 20 tensors agree" in report.notes

    def test_a_flipped_bit_is_found_by_the_recipe(self, folder: Path) -> None:
        sd_mecha.merge(recipe(folder), output=folder / "plain.safetensors")
        flip(folder / "plain.safetensors", "layers.3.weight")
        assert sd_mecha.verify(folder / "plain.safetensors").ok
        report = sd_mecha.verify(folder / "plain.safetensors", against="embedded", sample=None)
        where = "it differs in 1 of 384 elements, first element 0"
        assert report.problems == [f"tensor 'layers.3.weight' is not what the recipe makes: {where}"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
    def test_values_that_are_not_finite_are_counted(self, folder: Path, dtype: torch.dtype) -> None:
        spoilt = torch.ones(1 << 20)
        spoilt[[0, 5, -1]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        path = folder / "x.safetensors"
        save_file({"a": spoilt.to(dtype), "ids": torch.full((3,), -1), "b": torch.ones(2)}, path)
        report = sd_mecha.verify(path)
        assert report.non_finite == {"a": 3}
        assert report.problems == ["tensor 'a' has 3 values of 1048576 that are inf or nan"]
        allowed = sd_mecha.verify(path, allow_non_finite=True)
        assert allowed.ok
        assert allowed.non_finite == {"a": 3}

    @pytest.mark.parametrize("size", [4, 20, 2000, -1])
    def test_a_truncated_file_is_found(self, folder: Path, size: int) -> None:
        path = folder / "out.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        report = sd_mecha.verify(path, against="embedded")
        assert len(report.problems) == 1
        assert "out.safetensors" in report.problems[0]

    def test_other_files_are_found(self, tmp_path: Path) -> None:
        path = tmp_path / "page.html"
        path.write_text("<!DOCTYPE html><html></html>")
        assert len(sd_mecha.verify(path).problems) == 1

    def test_a_shard_that_is_damaged_is_found(self, folder: Path) -> None:
        sd_mecha.merge(recipe(folder), output=folder / "shards", checksums=True, shard_size=2000)
        shards = sorted((folder / "shards").glob("*.safetensors"))
        assert len(shards) > 2
        assert sd_mecha.verify(folder / "shards", against="embedded").ok
        key = next(iter(load_file(shards[1])))
        flip(shards[1], key)
        report = sd_mecha.verify(folder / "shards", against="embedded", sample=None)
        assert [repr(key) in problem for problem in report.problems] == [True, True]
        shards[1].unlink()
        assert not sd_mecha.verify(folder / "shards").ok


class TestChecksums:
    def test_an_input_that_changed_is_found(self, folder: Path) -> None:
        save_file(tensors(1) | {"layers.0.bias": torch.zeros(16)}, folder / "b.safetensors")
        report = sd_mecha.verify(folder / "out.safetensors")
        assert len(report.problems) == 1
        assert (
            "b.safetensors' has other values now in 1 tensor that the file was made from, such as 'layers.0.bias'"
            in report.problems[0]
        )
        assert sd_mecha.verify(folder / "out.safetensors", inputs=False).ok

    def test_an_input_that_lost_a_tensor_is_found(self, folder: Path) -> None:
        found = tensors(0)
        del found["layers.7.bias"]
        save_file(found, folder / "a.safetensors")
        (problem,) = sd_mecha.verify(folder / "out.safetensors").problems
        assert "no longer has 1 tensor that the file was made from, such as 'layers.7.bias'" in problem

    def test_inputs_that_are_gone_are_told(self, folder: Path) -> None:
        (folder / "a.safetensors").unlink()
        report = sd_mecha.verify(folder / "out.safetensors")
        assert report.ok
        assert len([note for note in report.notes if "is not here" in note]) == 1

    def test_an_input_that_the_file_replaced_is_no_problem(self, folder: Path) -> None:
        sd_mecha.merge(recipe(folder), output=folder / "a.safetensors", checksums=True)
        report = sd_mecha.verify(folder / "a.safetensors")
        assert report.ok, report
        assert [note for note in report.notes if "was replaced by this file" in note]

    def test_nor_can_what_it_was_made_of_be_made_again(self, folder: Path) -> None:
        sd_mecha.merge(recipe(folder), output=folder / "a.safetensors")
        report = sd_mecha.verify(folder / "a.safetensors", against="embedded")
        assert report.ok, report
        (note,) = [note for note in report.notes if "recipe" in note]
        assert re.fullmatch(r"it cannot be compared .*: its input '.*/a\.safetensors' was replaced by this file", note)

    @pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
    @pytest.mark.parametrize("ending", ["safetensors", "gguf"])
    @pytest.mark.parametrize("name", [b"a\xff", b"a\\udcff", b'a\\"\n'])
    def test_inputs_of_any_name_are_found(self, folder: Path, name: bytes, ending: str) -> None:
        path = folder / os.fsdecode(name)
        os.rename(folder / "a.safetensors", path)
        sd_mecha.merge(sd_mecha.model(path), output=folder / f"out.{ending}", checksums=True)
        report = sd_mecha.verify(folder / f"out.{ending}", against="embedded")
        assert report.ok, report
        assert f"input {str(path)!r} was compared: 21 tensors" in report.notes

    @pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody\0", "\\ud800", "\\u0000"])
    def test_names_that_no_input_has(self, tmp_path: Path, name: str) -> None:
        text = json.dumps({"algorithm": "sha256", "output": {}, "inputs": {name: {}}})
        save_file({}, tmp_path / "x.safetensors", {"mecha_checksums": text})
        report = str(sd_mecha.verify(tmp_path / "x.safetensors"))
        assert "is not here and was not compared" in report or "File name too long" in report

    @pytest.mark.parametrize("link", ["input", "output"])
    def test_nor_is_one_that_it_replaced_under_another_name(self, folder: Path, link: str) -> None:
        (folder / "link.safetensors").symlink_to("a.safetensors")
        file, name = ("a.safetensors", "link") if link == "input" else ("link.safetensors", "a")
        a, b = (sd_mecha.model(folder / f"{stem}.safetensors") for stem in (name, "b"))
        sd_mecha.merge(sd_mecha.n_average(a, b), output=folder / file, checksums=True)
        assert sd_mecha.verify(folder / file).ok

    def test_nor_is_a_file_of_the_folder_that_it_replaced(self, folder: Path) -> None:
        model = folder / "m"
        model.mkdir()
        (model / "config.json").write_text("{}")
        shutil.copy(folder / "a.safetensors", model / "model.safetensors")
        a, b = sd_mecha.model(model / "model.safetensors"), sd_mecha.model(folder / "b.safetensors")
        sd_mecha.merge(sd_mecha.n_average(a, b), output=f"{model}/", checksums=True)
        assert sd_mecha.verify(model).ok

    @pytest.mark.parametrize("inside", ["the input", "the output"])
    def test_but_one_that_lies_beside_it_in_a_folder_is_compared(self, folder: Path, inside: str) -> None:
        model = folder / "m"
        model.mkdir()
        (model / "config.json").write_text("{}")
        shutil.copy(folder / "a.safetensors", model / "model.safetensors")
        source, output = model, model / "merged.safetensors"
        if inside == "the output":
            source, output = model / "extra.safetensors", model
            shutil.copy(folder / "a.safetensors", source)
        sd_mecha.merge(sd_mecha.model(source), output=output, checksums=True)
        made = model / "model.safetensors" if output == model else output
        with safe_open(made, "pt") as file:
            save_file({**load_file(made), "w": torch.zeros(1)}, made, file.metadata())
        report = sd_mecha.verify(output, against="embedded", sample=None)
        assert report.problems, report
        assert f"input {str(source)!r} was compared: 21 tensors" in report.notes

    def test_addresses_in_a_file_are_not_visited(self, tmp_path: Path) -> None:
        text = '{"algorithm":"sha256","output":{},"inputs":{"http://127.0.0.1:1/m":{"w":"00"}}}'
        save_file({}, tmp_path / "x.safetensors", {"mecha_checksums": text})
        report = sd_mecha.verify(tmp_path / "x.safetensors")
        assert report.ok
        assert "input 'http://127.0.0.1:1/m' lies at an address and was not compared" in report.notes

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("{}", "it has no checksum of 1 tensor, such as 'w'"),
            ('{"w": "00", "v": "00"}', "it lacks, but has a checksum of, 1 tensor, such as 'v'"),
            ("5", "expected keys and their checksums"),
        ],
    )
    def test_checksums_must_fit(self, tmp_path: Path, output: str, message: str) -> None:
        text = f'{{"algorithm":"sha256","output":{output},"inputs":{{}}}}'
        save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors", {"mecha_checksums": text})
        assert message in str(sd_mecha.verify(tmp_path / "x.safetensors"))


class TestRecipe:
    def test_another_recipe_is_found(self, folder: Path) -> None:
        report = sd_mecha.verify(folder / "out.safetensors", against=recipe(folder, alpha=0.26), seed=1)
        assert report.compared == 16
        assert len(report.problems) >= 15  # one of the sample may be the integer
        assert all("is not what the recipe makes" in problem for problem in report.problems)

    def test_keys_are_compared(self, folder: Path) -> None:
        changes = {"layers.1.bias": None, "layers.2.bias": None, "new": torch.ones(1, dtype=torch.float16)}
        report = sd_mecha.verify(rewritten(folder, changes), against=recipe(folder))
        assert report.problems == [
            "it has 1 tensor that the recipe does not make, such as 'new'",
            "it lacks 2 tensors that the recipe makes, such as 'layers.1.bias', 'layers.2.bias'",
        ]

    def test_shapes_and_dtypes_are_compared(self, folder: Path) -> None:
        changes = {"layers.1.bias": torch.ones(3).half(), "steps": torch.tensor(3, dtype=torch.int32)}
        problems = sd_mecha.verify(rewritten(folder, changes), against=recipe(folder)).problems
        assert "tensor 'steps' is int32 of shape (); the recipe makes int64 of shape ()" in problems
        assert "tensor 'layers.1.bias' is float16 of shape (3,); the recipe makes float16 of shape (16,)" in problems

    def test_what_was_left_out_when_merging_is_no_problem(self, tmp_path: Path) -> None:
        spoilt = {
            key: torch.full_like(value, torch.nan) if "bias" in key else value for key, value in tensors(0).items()
        }
        save_file(spoilt, tmp_path / "a.safetensors")
        model = sd_mecha.model(tmp_path / "a.safetensors")
        sd_mecha.merge(model, output=tmp_path / "out.safetensors")
        assert sd_mecha.verify(tmp_path / "out.safetensors", against=model).ok
        report = sd_mecha.verify(tmp_path / "out.safetensors", against=model, sample=3)
        assert report.ok
        assert "it lacks 10 tensors of the recipe; 3 of them cannot be made" in report.notes

    def test_what_cannot_be_made_any_more_is_told(self, folder: Path) -> None:
        save_file(tensors(1) | {"layers.0.bias": torch.full((16,), torch.nan)}, folder / "b.safetensors")
        report = sd_mecha.verify(folder / "out.safetensors", against="embedded", sample=None, inputs=False)
        assert report.problems == ["the recipe cannot make 1 tensor any more, such as 'layers.0.bias'"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
    def test_the_dtype_is_that_of_the_file(self, folder: Path, dtype: torch.dtype | None) -> None:
        sd_mecha.merge(recipe(folder), output=folder / "x.safetensors", output_dtype=dtype)
        assert sd_mecha.verify(folder / "x.safetensors", against="embedded", sample=None).ok
        wrong = sd_mecha.verify(folder / "x.safetensors", against="embedded", output_dtype=torch.float16)
        assert "is bfloat16" in str(wrong) if dtype == torch.bfloat16 else "is float32" in str(wrong)
        assert "--dtype" not in str(wrong)

    def test_a_dtype_that_the_file_does_not_tell_is_asked_for(self, folder: Path) -> None:
        sd_mecha.merge(recipe(folder), output=folder / "x.safetensors", output_dtype=torch.int8)
        report = sd_mecha.verify(folder / "x.safetensors", against="embedded")
        assert "it does not tell what output_dtype (--dtype) it was merged with: give that" in report.notes
        assert sd_mecha.verify(folder / "x.safetensors", against="embedded", output_dtype=torch.int8).ok

    def test_scaled_fp8_is_made_again(self, folder: Path) -> None:
        path = folder / "x.safetensors"
        sd_mecha.merge(recipe(folder), output=path, scaled_fp8=True)
        assert sd_mecha.verify(path, against="embedded", sample=None).ok
        flip(path, "layers.4.scale_weight")
        (problem,) = sd_mecha.verify(path, against="embedded", sample=None).problems
        assert "'layers.4.scale_weight' is not what the recipe makes" in problem

    def test_a_missing_input_is_a_problem(self, folder: Path) -> None:
        (folder / "a.safetensors").unlink()
        (problem,) = sd_mecha.verify(folder / "out.safetensors", against="embedded").problems
        assert "cannot be compared with the recipe" in problem
        assert "a.safetensors" in problem

    def test_a_file_without_a_recipe_says_so(self, folder: Path) -> None:
        (problem,) = sd_mecha.verify(folder / "a.safetensors", against="embedded").problems
        assert "carries no recipe" in problem

    def test_the_sample_follows_the_seed(self, folder: Path) -> None:
        def found(seed: int) -> Report:
            return sd_mecha.verify(folder / "out.safetensors", against=recipe(folder, 0.5), sample=4, seed=seed)

        assert found(1).problems == found(1).problems
        assert len({tuple(found(seed).problems) for seed in range(4)}) > 1
        assert [note for note in found(7).notes if note == "tensors merged again and compared: 4 of 21 (seed 7)"]


def test_options_are_checked(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        sd_mecha.verify(folder / "nothing.safetensors")
    with pytest.raises(OptionError, match="output is an option of outputs"):
        sd_mecha.verify(folder / "a.safetensors", output="x")
    with pytest.raises(OptionError, match="unknown option 'dtype'"):
        sd_mecha.verify(folder / "a.safetensors", dtype="fp16")
    with pytest.raises(OptionError, match="sample must be"):
        sd_mecha.verify(folder / "a.safetensors", sample=-1)


def test_relative_inputs_are_found_in_the_model_directories(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    a, b = sd_mecha.model("a.safetensors"), sd_mecha.model("b.safetensors")
    sd_mecha.merge(sd_mecha.n_average(a, b), output=folder / "c.safetensors", checksums=True)
    (folder / "elsewhere").mkdir()
    for name in "ab":
        shutil.move(folder / f"{name}.safetensors", folder / "elsewhere")
    sd_mecha.extensions.model_dirs.add_path(folder / "elsewhere")
    report = sd_mecha.verify(folder / "c.safetensors", against="embedded")
    assert report.ok
    assert len([note for note in report.notes if "was compared: 2" in note]) == 2
