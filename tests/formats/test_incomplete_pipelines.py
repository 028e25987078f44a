"""Pipelines with components that lack weights: refused if only a part was downloaded, told of if there are none."""

from __future__ import annotations

import json
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
        ([SHARD], f"got ['{SHARD}']"),
        ([INDEX.replace("json", "bf16.x.json"), "one.safetensors"], "one.safetensors"),
        (["config.json", "own.bin.index.json"], "own.bin.index.json"),
        (["one.bin", "two.bin"], "got ['one.bin', 'two.bin']"),
    ],
)
def test_a_model_with_a_part_of_its_weights_is_refused(folder: Path, names: list[str], got: str) -> None:
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
    if shard_size:
        assert "unet: component of class 'UNet2DConditionModel' without weights" in problem
    else:
        assert problem == "it has no weights of 1 component that a merge made, such as 'unet'"


def test_schedulers_tokenizers_and_processors_need_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    listing = json.loads((folder / "model_index.json").read_text())
    del listing["unet"]
    (folder / "model_index.json").write_text(json.dumps(listing))
    assert set(averaged(folder)) == {"vae.w"}
    assert not caplog.records


@pytest.mark.parametrize(
    "names",
    [
        ["config.json"],
        ["watermark_config.json"],
        ["config.json", "diffusion_flax_model-1.msgpack", "diffusion_flax_model.msgpack.index.json"],
        ["model.onnx", "model.onnx_data"],
        ["t5-q8.gguf"],
    ],
)
def test_a_model_without_weights_that_can_be_read_goes_along(
    folder: Path, names: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sd_mecha.storage.folders.side_files.MAX_SIDE_FILE", 1000)
    (folder / "unet" / "config.json").unlink()
    for name in names:
        (folder / "unet" / name).write_text("{}" if name.endswith("json") else "weights" * 1000)
    out = folder.parent / "out"
    averaged(folder, output=f"{out}/")
    (message,) = [record.getMessage() for record in caplog.records if "'unet'" in record.getMessage()]
    assert message == (
        f"{folder / 'unet'}: component 'unet' has no weights that can be read; it is not part of the model and goes "
        "along as it is"
    )
    for name in names:
        assert (out / "unet" / name).read_bytes() == (folder / "unet" / name).read_bytes()
    assert {path.name for path in (out / "unet").iterdir()} == set(names)
    report = sd_mecha.verify(out, against="embedded")
    assert report.ok, report
    assert report.compared == 1


def test_links_to_weights_that_cannot_be_read_are_not_followed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder.parent / "secret").write_text("private")
    (folder / "unet" / "x.gguf").symlink_to("../../secret")
    averaged(folder, output=f"{folder.parent}/out/")
    assert [path.name for path in (folder.parent / "out" / "unet").iterdir()] == ["config.json"]
    assert "out of the folder of the model, do not go along: such as 'x.gguf'" in caplog.text


def test_a_component_may_be_a_link(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"w": torch.ones(2)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet").rename(folder.parent / "elsewhere")
    (folder / "unet").symlink_to("../elsewhere", target_is_directory=True)
    averaged(folder, output=f"{folder.parent}/out/")
    assert (folder.parent / "out" / "unet" / "config.json").is_file()
    assert sd_mecha.verify(folder.parent / "out", against="embedded").ok
    assert not caplog.records
