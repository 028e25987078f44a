"""Files of weights under other names than the usual: in variants, and as the only file beside a configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sd_mecha
from sd_mecha.errors import FileFormatError
from tests.formats.hugging import averaged

CONFIG = '{"model_type": "tiny"}'
SPELLINGS = [
    ("{stem}.{variant}-0000{n}-of-00002.safetensors", "{stem}.safetensors.index.{variant}.json"),
    ("{stem}-0000{n}-of-00002.{variant}.safetensors", "{stem}.safetensors.index.{variant}.json"),
]


def sharded(folder: Path, stem: str, variant: str, spelling: tuple[str, str]) -> Path:
    """A model of two tensors in two files."""
    folder.mkdir(parents=True)
    names = {f"{n}.w": spelling[0].format(stem=stem, variant=variant, n=n) for n in (1, 2)}
    for key, name in names.items():
        save_file({key: torch.ones(2)}, folder / name)
    (folder / spelling[1].format(stem=stem, variant=variant)).write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text(CONFIG)
    return folder


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema", "fp8"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_variant_in_several_files_is_read_and_replaced(
    tmp_path: Path, stem: str, variant: str, spelling: tuple[str, str]
) -> None:
    folder = sharded(tmp_path / "a", stem, variant, spelling)
    assert set(averaged(folder)) == {"1.w", "2.w"}
    averaged(folder, output=folder)
    assert sorted(os.listdir(folder)) == ["config.json", f"{stem}.safetensors"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_component_may_be_a_variant(tmp_path: Path, spelling: tuple[str, str]) -> None:
    sharded(tmp_path / "a" / "unet", "diffusion_pytorch_model", "bf16", spelling)
    (tmp_path / "a" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    averaged(tmp_path / "a", output=f"{tmp_path}/out/")
    assert set(averaged(tmp_path / "out")) == {"unet.1.w", "unet.2.w"}


def test_one_of_several_variants_is_read_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for value, variant in enumerate(("bf16", "ema")):
        save_file({"w": torch.full((2,), float(value))}, folder / f"model.{variant}.safetensors")
    (folder / "config.json").write_text(CONFIG)
    with pytest.raises(FileFormatError, match=r"'model\.bf16\.safetensors', 'model\.ema\.safetensors'.*name the file"):
        averaged(folder)
    averaged(folder / "model.ema.safetensors", output=f"{tmp_path}/out/", output_dtype="float32")
    assert (tmp_path / "out" / "config.json").read_text() == CONFIG
    assert averaged(tmp_path / "out")["w"].tolist() == [1.0, 1.0]
    averaged(tmp_path / "out", output=folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("others", [[], ["another.safetensors"]])
def test_the_only_file_beside_a_config_is_its_model_under_any_name(
    tmp_path: Path, others: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("llama-weights.safetensors", *others):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    (tmp_path / "config.json").write_text(CONFIG)
    averaged(tmp_path / "llama-weights.safetensors", output=f"{tmp_path}/out/")
    assert (tmp_path / "out" / "config.json").exists() is not bool(others)
    assert ("is written without a config.json" in caplog.text) is bool(others)


def test_an_index_is_called_one_whatever_it_begins_with(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf\n {"parameters": 1}')
    report = sd_mecha.verify(tmp_path / "x.json")
    assert "a JSON text, such as the index" in report.problems[0]
