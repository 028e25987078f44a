"""Pipelines of which a part was not downloaded: refused, as its tensors would be missing in what is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sd_mecha
from sd_mecha.errors import FileFormatError
from tests.formats.hugging import averaged

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline with weights in the VAE, and a UNet without."""
    path = tmp_path / "pipeline"
    classes = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "DDIMScheduler",
        "tokenizer": "CLIPTokenizerFast",
        "feature_extractor": "CLIPImageProcessor",
        "old_extractor": "CLIPFeatureExtractor",
    }
    for name in classes:
        (path / name).mkdir(parents=True)
        (path / name / "config.json").write_text("{}")
    listing = {name: ["diffusers", kind] for name, kind in classes.items()}
    (path / "model_index.json").write_text(json.dumps({**listing, "safety_checker": [None, None]}))
    (path / "safety_checker").mkdir()
    (path / "safety_checker" / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, path / "vae" / "diffusion_pytorch_model.safetensors")
    return path


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (["config.json"], "got ['config.json']"),
        ([SHARD], f"got ['{SHARD}']"),
        ([INDEX.replace("json", "bf16.x.json"), "one.safetensors"], "one.safetensors"),
        (["config.json", "diffusion_flax_model.msgpack"], "diffusion_flax_model.msgpack"),
    ],
)
def test_a_model_without_weights_is_refused(folder: Path, names: list[str], got: str) -> None:
    (folder / "unet" / "config.json").unlink()
    for name in names:
        (folder / "unet" / name).write_text("{}")
    with pytest.raises(FileFormatError) as caught:
        averaged(folder, output=f"{folder.parent}/out/")
    told = str(caught.value)
    assert told.startswith(f"{folder / 'unet'}: component of class 'UNet2DConditionModel' without weights: got ")
    assert got in told
    assert told.endswith("download it, or set unet to [null, null] in model_index.json")
    assert sd_mecha.verify(folder).problems == [told]
    assert [path.name for path in folder.parent.iterdir()] == ["pipeline"]


@pytest.mark.parametrize("shard_size", [None, 10])
def test_what_a_merge_made_and_was_lost_is_told(folder: Path, tmp_path: Path, shard_size: int | None) -> None:
    save_file({"w": torch.ones(4), "v": torch.ones(4)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    averaged(folder, output=f"{tmp_path}/out/", shard_size=shard_size)
    assert sd_mecha.verify(tmp_path / "out", against="embedded").ok
    (tmp_path / "out" / "unet" / (INDEX if shard_size else "diffusion_pytorch_model.safetensors")).unlink()
    (problem,) = sd_mecha.verify(tmp_path / "out").problems
    assert "unet: component of class 'UNet2DConditionModel' without weights" in problem


def test_schedulers_tokenizers_and_processors_need_none(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    assert set(averaged(folder)) == {"vae.w"}


def test_a_model_with_files_of_no_other_kind_needs_none(folder: Path) -> None:
    (folder / "unet" / "config.json").rename(folder / "unet" / "watermark_config.json")
    assert set(averaged(folder)) == {"vae.w"}
