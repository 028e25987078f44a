"""`sd-mecha info`: what a file or a config is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from sd_mecha.cli import main


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["info", *(str(a) for a in arguments)])


def rows(result: Result) -> dict[str, list[str]]:
    """The rows of the tables: the first cell -> the others."""
    cells = [line.split() for line in result.stdout.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) == 3}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {
        f"model.layers.{i}.{name}.weight": torch.zeros(4, 3, dtype=torch.float16)
        for i in range(2)
        for name in ("attn.q_proj", "mlp.up_proj")
    }
    path = tmp_path / "m.safetensors"
    save_file({**tensors, "model.embed_tokens.weight": torch.zeros(5)}, path, {"title": "long " * 100, "format": "pt"})
    return path


def test_a_config_is_listed_by_component() -> None:
    result = call("sd1-ldm")
    assert result.exit_code == 0, result.stderr
    assert "config: sd1-ldm" in result.stdout
    assert rows(result)["diffuser"] == ["686", "859,520,964"]
    assert "input_blocks" not in result.stdout


def test_the_blocks_of_a_config_are_listed() -> None:
    found = rows(call("sd1-ldm", "--blocks"))
    assert found["input_blocks.0"] == ["2", "11,840"]
    assert {"middle_block", "output_blocks.11", "clip_l.layers.0"} <= found.keys()


def test_a_file_tells_its_dtypes_metadata_and_blocks(model: Path) -> None:
    result = call(model, "--blocks")
    assert result.exit_code == 0, result.stderr
    assert "config: structural" in result.stdout
    assert "4 float16, 1 float32" in result.stdout
    assert "metadata: format = pt" in result.stdout
    assert "(500 characters)" in result.stdout
    assert rows(result) == {
        "keys": ["5", "53"],
        "layers.0": ["2", "24"],
        "layers.1": ["2", "24"],
        "component": ["keys", "parameters"],
        "block": ["keys", "parameters"],
    }


def test_a_file_of_a_known_config_is_recognised(tmp_path: Path) -> None:
    keys = ["first_stage_model.quant_conv.bias", "first_stage_model.post_quant_conv.bias"]
    path = tmp_path / "vae.safetensors"
    save_file({**{key: torch.zeros(8 if "post" not in key else 4) for key in keys}, "extra": torch.zeros(1)}, path)
    result = call(path)
    assert rows(result)["vae"] == ["2", "12"]
    assert "not in the config: 1 keys, such as 'extra'" in result.stdout


def test_a_relative_file_is_found_in_a_models_dir(model: Path) -> None:
    result = call(model.name, "--models-dir", model.parent)
    assert result.exit_code == 0, result.stderr
    assert "4 float16" in result.stdout


def test_a_model_without_blocks_says_so(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert "The keys show no blocks." in call(tmp_path / "w.safetensors", "--blocks").stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [("sd1-lmd", "did you mean 'sd1-ldm'?; nor is there a file"), ("gone.safetensors", "does not exist")],
)
def test_what_is_neither_is_an_error_of_one_message(argument: str, message: str) -> None:
    result = call(argument)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_link_that_leads_nowhere_is_not_taken_for_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to("gone")
    assert "is a link that leads nowhere, to 'gone'" in call("model").stderr


def test_a_stand_in_for_a_config_is_a_usage_error() -> None:
    assert call("infer").exit_code == 2
