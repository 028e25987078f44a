"""What travels with a result: the metadata of the first model, the format, and the recipe, which merges again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.extensions import model_configs
from sd_mecha.recipes.nodes import ModelRecipeNode, RecipeNode

SD1 = "model.diffusion_model.out.2.bias", "model.diffusion_model.out.0.bias"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    paths = []
    for i in range(3):
        path = tmp_path / f"m{i} \"quoted\" = 'x'.safetensors"
        tensors = {"w": torch.rand(40, 40), "n": torch.rand(7).half(), "ids": torch.arange(5)}
        save_file(tensors, path, metadata={"title": f"model {i}", "format": "tf", "mecha_recipe": "old"})
        paths.append(path)
    return paths


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_metadata_is_that_of_the_first_model_with_the_recipe(tmp_path: Path, models: list[Path]) -> None:
    recipe = sd_mecha.weighted_sum(models[1], models[0])
    path = tmp_path / "o.safetensors"
    sd_mecha.merge(recipe, output=path)
    in_file, in_memory = metadata(path), sd_mecha.merge(recipe)["__metadata__"]
    assert in_file == in_memory
    assert in_file["title"] == "model 1"
    assert in_file["format"] == "pt"
    assert in_file["mecha_recipe"].startswith("version 0.1.0\n")


def test_metadata_of_a_model_in_memory_is_kept_and_a_result_can_be_merged_again(models: list[Path]) -> None:
    first = sd_mecha.merge(sd_mecha.model(models[2]))
    again = sd_mecha.merge(sd_mecha.n_average(sd_mecha.model(first), sd_mecha.model(models[0])))
    assert again["__metadata__"]["title"] == "model 2"


def test_a_recipe_that_holds_tensors_is_left_out(tmp_path: Path, models: list[Path]) -> None:
    merged = sd_mecha.merge(sd_mecha.weighted_sum(models[0], models[1], alpha=torch.rand(1)))
    assert merged["__metadata__"] == {"title": "model 0", "format": "pt"}


RECIPES: dict[str, Any] = {
    "copy": lambda a, b, c: a,
    "weighted_sum": lambda a, b, c: sd_mecha.weighted_sum(a, b, alpha=1 / 3),
    "add_difference": lambda a, b, c: a + (b - c) * 0.7,
    "slerp of shared": lambda a, b, c: sd_mecha.slerp(sd_mecha.n_average(a, b), sd_mecha.n_average(a, b) | c),
    "by key": lambda a, b, c: sd_mecha.weighted_sum(a, b, alpha={"w": 0.25, "n": 0.5, "ids": 0.0}),
    "delta": lambda a, b, c: b - c,
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_in_an_output_merges_to_the_same_bytes(tmp_path: Path, models: list[Path], name: str) -> None:
    recipe = RECIPES[name](*map(sd_mecha.model, models))
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    sd_mecha.merge(recipe, output=first, strict_merge_space=None)
    read = sd_mecha.deserialize(metadata(first)["mecha_recipe"])
    inputs = [node for node in read if isinstance(node, ModelRecipeNode)]
    assert inputs
    assert all(node.model_config == model_configs.STRUCTURAL for node in inputs)
    sd_mecha.merge(read, output=second, strict_merge_space=None)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("finalize", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_serialised_recipes_come_back(tmp_path: Path, models: list[Path], name: str, finalize: bool) -> None:
    recipe: RecipeNode = RECIPES[name](*map(sd_mecha.model, models))
    text = sd_mecha.serialize(recipe, finalize=finalize)
    read = sd_mecha.deserialize(text)
    assert sd_mecha.serialize(read, finalize=finalize) == text
    assert (read == recipe) is not finalize
    options = {"strict_merge_space": None, "output_dtype": None}
    one, other = (sd_mecha.merge(r, **options) for r in (recipe, read))
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[k]) for k, t in one.items() if isinstance(t, torch.Tensor))


def test_an_incomplete_model_of_a_known_config(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for value, path in enumerate(paths):
        save_file({key: torch.full((4,), float(value)) for key in SD1}, path)
    recipe = sd_mecha.weighted_sum(*(sd_mecha.model(p, config="sd1-ldm") for p in paths))
    text = sd_mecha.serialize(recipe)
    assert 'model_config="sd1-ldm"' in text
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    sd_mecha.merge(recipe, output=first)
    sd_mecha.merge(sd_mecha.deserialize(metadata(first)["mecha_recipe"]), output=second)
    assert first.read_bytes() == second.read_bytes()
    assert load_file(first)[SD1[0]].tolist() == [0.5] * 4


def test_a_recipe_names_models_that_need_not_exist(tmp_path: Path) -> None:
    recipe = sd_mecha.weighted_sum(sd_mecha.model("gone.safetensors"), sd_mecha.model("missing.safetensors"))
    text = sd_mecha.serialize(recipe, finalize=False)
    assert sd_mecha.deserialize(text) == recipe
    assert sd_mecha.deserialize(text.splitlines()) == recipe
    with pytest.raises(FileNotFoundError, match=r"(?s)gone\.safetensors.*missing\.safetensors"):
        sd_mecha.serialize(recipe)


def test_a_result_does_not_depend_on_the_working_directory(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sd_mecha.n_average(*map(sd_mecha.model, models))
    monkeypatch.chdir(tmp_path)
    expected = sd_mecha.merge(recipe)
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    assert torch.equal(sd_mecha.merge(recipe)["w"], expected["w"])
