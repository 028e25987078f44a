"""What an output is called, and what goes along with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.errors import OutputError


def folder(path: Path, kind: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({"w": torch.ones(2, 2)}, path / "model.safetensors")
    return path


def test_each_of_several_outputs_takes_after_its_own_recipe(tmp_path: Path) -> None:
    one, other = (sd_mecha.model(folder(tmp_path / kind, kind)) for kind in ("llama", "qwen3"))
    plain = sd_mecha.model({"w": torch.ones(2, 2)})
    names = ("a", "b", "c", "d")
    recipes = (one, other, sd_mecha.n_average(other, one), plain)
    sd_mecha.merge_many({f"{tmp_path}/{name}/": recipe for name, recipe in zip(names, recipes, strict=True)})
    configs = {name: tmp_path / name / "config.json" for name in names}
    kinds = {name: json.loads(path.read_text())["model_type"] for name, path in configs.items() if path.exists()}
    assert kinds == {"a": "llama", "b": "qwen3", "c": "qwen3"}


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize("address", ["s3://bucket/out.safetensors", "https://me:secret@host/out.safetensors"])
def test_addresses_are_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, as_path: bool) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is an address, and outputs are local") as caught:
        sd_mecha.merge(sd_mecha.model({"w": torch.ones(1)}), output=Path(address) if as_path else address)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_not_replaced_by_a_model(tmp_path: Path) -> None:
    recipe = tmp_path / "r.mecha"
    recipe.write_text("mine")
    with pytest.raises(OutputError, match=r"name of a recipe.*r\.safetensors"):
        sd_mecha.merge(sd_mecha.model({"w": torch.ones(1)}), output=recipe)
    assert recipe.read_text() == "mine"


def test_integers_are_written_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "o.safetensors"
    sd_mecha.merge(sd_mecha.model({"w": torch.tensor([1.5, -2.0])}), output=path, output_dtype="int8")
    assert load_file(path)["w"].tolist() == [1, -2]
    assert "it is no quantisation" in caplog.text
