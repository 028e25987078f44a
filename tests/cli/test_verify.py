"""`sd-mecha verify`: what it prints, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import sd_mecha
from sd_mecha.cli import main


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe and what the command line makes of it, with checksums, in bfloat16."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file({f"{i}.weight": torch.randn(4, 4) for i in range(20)}, tmp_path / f"{name}.safetensors")
    a, b = (sd_mecha.model(tmp_path / f"{name}.safetensors") for name in "ab")
    sd_mecha.serialize(sd_mecha.weighted_sum(a, b), output=tmp_path / "mix.mecha")
    sd_mecha.serialize(sd_mecha.weighted_sum(a, b, alpha=0.3), output=tmp_path / "other.mecha")
    result = call("merge", tmp_path / "mix.mecha", "--checksums", "--dtype", "bf16", "--no-progress")
    assert result.exit_code == 0, result.output
    return tmp_path


@pytest.mark.parametrize("against", [[], ["--against", "embedded"], ["--against", "mix.mecha"]])
def test_a_sound_file(folder: Path, against: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = call("verify", "mix.safetensors", *against, "--seed", "5")
    assert result.exit_code == 0, result.output
    assert "mix.safetensors: sound (20 tensors, 640 B)" in result.stdout
    assert "the checksums of 20 tensors agree" in result.stdout
    assert ("merged again and compared: 16 of 20 (seed 5)" in result.stdout) == bool(against)


def test_another_recipe(folder: Path) -> None:
    result = call("verify", folder / "mix.safetensors", "--against", folder / "other.mecha", "--sample", "all")
    assert result.exit_code == 1
    assert result.stdout.count("problem: tensor") == 20
    assert "20 problems" in result.stdout


def test_several_files_of_which_one_is_damaged(folder: Path) -> None:
    raw = (folder / "mix.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(raw[:-1])
    (folder / "flipped.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    result = call("verify", folder / "short.safetensors", folder / "mix.safetensors", folder / "flipped.safetensors")
    assert result.exit_code == 1
    heads = [line.partition(" (")[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert [head.rpartition("/")[2] for head in heads] == [
        "short.safetensors: 1 problem",
        "mix.safetensors: sound",
        "flipped.safetensors: 1 problem",
    ]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1, torch.nan])}, tmp_path / "x.safetensors")
    result = call("verify", tmp_path / "x.safetensors")
    assert result.exit_code == 1
    assert "problem: tensor 'w' has 1 values of 2 that are inf or nan" in result.stdout
    assert call("verify", tmp_path / "x.safetensors", "--allow-non-finite").exit_code == 0


def test_inputs_that_changed(folder: Path) -> None:
    save_file({"0.weight": torch.zeros(1)}, folder / "a.safetensors")
    assert call("verify", folder / "mix.safetensors").exit_code == 1
    assert call("verify", folder / "mix.safetensors", "--skip-inputs").exit_code == 0


def test_json(folder: Path) -> None:
    arguments = ["verify", folder / "mix.safetensors", "--json", "--against", folder / "mix.mecha"]
    (report,) = json.loads(call(*arguments).stdout)
    assert report["ok"]
    assert (report["tensors"], report["compared"], report["problems"]) == (20, 16, [])
    (report,) = json.loads(call(*arguments, "--dtype", "fp16").stdout)
    assert not report["ok"]


def test_a_file_that_cannot_be_opened_is_a_report_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    files = ["a.safetensors", "gone.safetensors", "circle.safetensors", "b.safetensors"]
    result = call("verify", *files, "--json")
    assert result.exit_code == 1
    reports = json.loads(result.stdout)
    assert [Path(report["name"]).name for report in reports] == files
    assert [report["ok"] for report in reports] == [True, False, False, True]
    assert [len(report["problems"]) for report in reports] == [0, 1, 1, 0]
    assert "does not exist in any of these directories" in reports[1]["problems"][0]
    assert str(folder) in reports[1]["problems"][0]
    assert "a link in a circle" in reports[2]["problems"][0]
    text = call("verify", *files)
    assert text.exit_code == 1
    assert "gone.safetensors: 1 problem" in text.stdout
    assert "b.safetensors: sound" in text.stdout


def test_usage(folder: Path) -> None:
    assert call("verify").exit_code == 2
    assert "neither a number nor 'all'" in call("verify", folder / "mix.safetensors", "--sample", "few").stderr
    text = call("verify", folder / "mix.safetensors", "--against", folder / "gone.mecha")
    assert text.exit_code == 1
    assert "gone.mecha" in text.stderr
