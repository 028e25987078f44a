"""Recipes that cannot mean anything: the error says what was found, what was expected and where in the recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha import serialization
from sd_mecha.errors import (
    ConfigError,
    EmptyMergeError,
    MergeSpaceError,
    PlanError,
    RecipeError,
    RecipeFileError,
    RecipeTypeError,
    RecipeVersionError,
    ShapeError,
    UnknownNameError,
)
from sd_mecha.extensions import merge_methods, merge_spaces, model_configs
from tests.faults.support import refused

LDM = "model.diffusion_model.out.2.bias"
BLOCK = "BASE"


def test_unknown_names_suggest_near_ones_only(a: Path) -> None:
    for near, call in {
        "'weighted_sum'": lambda: merge_methods.resolve("weigthed_sum"),
        "'sd1-ldm'": lambda: sd_mecha.model(a, config="sd1-ldn"),
        "'weight'": lambda: sd_mecha.model(a, merge_space="wieght"),
        "'delta'": lambda: sd_mecha.merge(sd_mecha.model(a), strict_merge_space="dleta"),
    }.items():
        with refused(UnknownNameError, KeyError, says=["did you mean", near]):
            call()
    for resolve in (merge_methods.resolve, model_configs.resolve, merge_spaces.resolve):
        with pytest.raises(KeyError, match="qqqq") as caught:
            resolve("qqqq")
        assert "did you mean" not in str(caught.value)


def test_a_delta_as_result_names_both_sides_and_the_option(a: Path, b: Path) -> None:
    recipe = sd_mecha.model(a) - sd_mecha.model(b)
    with refused(MergeSpaceError, TypeError, says=["delta is what subtract returns", "weight", "strict_merge_space"]):
        sd_mecha.merge(recipe)
    assert sd_mecha.merge(recipe, strict_merge_space=None)["b"].tolist() == [-2.0] * 4
    assert sd_mecha.merge(recipe, strict_merge_space="delta")["b"].tolist() == [-2.0] * 4


def test_spaces_that_contradict_each_other_are_both_named_with_their_places(a: Path, b: Path) -> None:
    recipe = sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b, merge_space="delta"))
    says = ["weight", "delta", f'weighted_sum > a: model "{a.as_posix()}"', f'weighted_sum > b: model "{b.as_posix()}"']
    with refused(MergeSpaceError, TypeError, says=says):
        sd_mecha.merge(recipe)


def test_contradictions_of_space_and_config_are_reported_together(a: Path) -> None:
    one = sd_mecha.model(a, config="sd1-ldm")
    other = sd_mecha.model(a, config="sd1-supermerger_blocks", merge_space="delta")
    with refused(PlanError, TypeError, says=["merge spaces", "model configs", "sd1-ldm", "sd1-supermerger_blocks"]):
        sd_mecha.merge(sd_mecha.weighted_sum(one, other))


def test_mixed_configs_name_both_and_what_to_do() -> None:
    one = sd_mecha.model({LDM: torch.ones(1)}, config="sd1-ldm")
    other = sd_mecha.model({BLOCK: torch.ones(1)}, config="sd1-supermerger_blocks")
    with refused(ConfigError, TypeError, says=["sd1-ldm", "sd1-supermerger_blocks", "convert"]):
        sd_mecha.merge(sd_mecha.weighted_sum(one, other))


def test_a_declared_config_that_fits_no_key(a: Path) -> None:
    with refused(EmptyMergeError, RuntimeError, says=[a.as_posix(), "sd1-ldm", "'b'", "allow_empty_merge"]):
        sd_mecha.merge(sd_mecha.model(a, config="sd1-ldm"))


def test_models_without_a_common_key(a: Path) -> None:
    recipe = sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model({"z": torch.ones(1)}))
    with refused(EmptyMergeError, RuntimeError, says=[a.as_posix(), "'b'", "'z'"]):
        sd_mecha.merge(recipe)
    merged = sd_mecha.merge(recipe, allow_empty_merge=True)
    assert not [k for k in merged if k != "__metadata__"]


@pytest.mark.parametrize("recipe", [3, None, 0.5, torch.ones(2), sd_mecha.weighted_sum(1.0, 2.0), sd_mecha.model({})])
def test_a_recipe_that_makes_nothing(recipe: Any) -> None:
    with refused(EmptyMergeError, RuntimeError, says=["makes no key"]):
        sd_mecha.merge(recipe)


def test_what_is_no_recipe_at_all() -> None:
    with refused(RecipeTypeError, TypeError, says=["'a.safetensors' is a str", "sd_mecha.model(path)"]):
        sd_mecha.merge("a.safetensors")
    with refused(RecipeTypeError, TypeError, says=["list"]):
        sd_mecha.merge([1])  # type: ignore[arg-type]
    with refused(RecipeTypeError, TypeError, says=["list"]):
        sd_mecha.model([1])  # type: ignore[arg-type]


ALPHAS: list[tuple[Any, list[str]]] = [
    ("half", ["weighted_sum: alpha", "str 'half'", "Tensor"]),
    (None, ["weighted_sum: alpha", "None", "Tensor"]),
    ([1, 2], ["weighted_sum: alpha", "list"]),
    (object(), ["weighted_sum: alpha", "object"]),
    (1 + 2j, ["weighted_sum: alpha", "complex"]),
    ({"w": 0.5, "b": "x"}, ["weighted_sum: alpha", "mixes"]),
    ({1: 0.5}, ["weighted_sum: alpha", "must be str", "int"]),
    (sd_mecha.literal("half"), ["weighted_sum: alpha", "'half'", "Tensor"]),
    (sd_mecha.literal(None), ["weighted_sum: alpha", "None", "Tensor"]),
]


@pytest.mark.parametrize(("alpha", "says"), ALPHAS)
def test_a_parameter_of_the_wrong_type_is_named(a: Path, b: Path, alpha: Any, says: list[str]) -> None:
    with refused(RecipeTypeError, TypeError, says=says):
        sd_mecha.merge(sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=alpha))


def test_a_parameter_tensor_that_does_not_broadcast(a: Path, b: Path) -> None:
    recipe = sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=torch.ones(7))
    with refused(ShapeError, RuntimeError, says=["weighted_sum", "alpha", (7,), (6, 4), "'w'", "'b'"]):
        sd_mecha.merge(recipe)
    fits = sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=torch.tensor([0.0, 0.5, 1.0, 0.25]))
    assert sd_mecha.merge(fits)["b"].tolist() == [1.0, 2.0, 3.0, 1.5]


def test_arguments_that_do_not_fit_show_the_signature(a: Path) -> None:
    model = sd_mecha.model(a)
    with refused(RecipeTypeError, TypeError, says=["weighted_sum(a, b", "missing", "'b'"]):
        sd_mecha.weighted_sum(model)
    with refused(RecipeTypeError, TypeError, says=["weighted_sum(a, b", "'beta'"]):
        sd_mecha.weighted_sum(model, model, beta=0.5)


def test_a_str_is_no_path_where_a_tensor_is_expected_and_a_path_is(a: Path, b: Path) -> None:
    with refused(RecipeTypeError, TypeError, says=["weighted_sum: a", str(a), "sd_mecha.model(path)"]):
        sd_mecha.weighted_sum(str(a), b)
    assert sd_mecha.merge(sd_mecha.weighted_sum(a, b))["b"].tolist() == [2.0] * 4


def test_texts_and_files_that_are_no_recipe(tmp_path: Path) -> None:
    for empty in ("", [], "\n\n"):
        with refused(RecipeVersionError, ValueError, RuntimeError, says=["version 0.1.0"]):
            sd_mecha.deserialize(empty)
    for name, why in {"gone.mecha": "No such file", "r.txt": ".mecha", "folder.mecha": "directory"}.items():
        (tmp_path / "folder.mecha").mkdir(exist_ok=True)
        for path in (tmp_path / name, str(tmp_path / name)):
            with refused(ValueError, says=[tmp_path / name, why]):
                sd_mecha.deserialize_path(path)


@pytest.mark.parametrize("name", ["a\0b.mecha", "a\ud800b.mecha"])
def test_names_that_no_recipe_file_has(name: str) -> None:
    with refused(RecipeFileError, FileNotFoundError, says=["the recipe cannot be read"]):
        sd_mecha.deserialize_path(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_no_recipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mecha")
    (tmp_path / "zero.mecha").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        with refused(RecipeFileError, says=[path, "it is a directory, a pipe or a device"]):
            sd_mecha.deserialize_path(path)


def test_a_recipe_file_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "r.mecha"
    path.write_text("version 0.1.0\ndict a=1")
    os.truncate(path, 1 << 40)
    with refused(RecipeFileError, says=[path, "it has more than 67108864 bytes"]):
        sd_mecha.deserialize_path(path)


def test_no_recipe_is_written_that_is_too_large_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_TEXT", 100)
    with refused(RecipeError, says=["the recipe is too large: its text has", "expected at most 100"]):
        sd_mecha.serialize(sd_mecha.model("a" * 100), finalize=False, output=tmp_path / "r.mecha")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_too_long_to_compute_with(a: Path) -> None:
    long = 1 << 20_000
    for recipe in (sd_mecha.literal({"w": long}, None, "weight"), sd_mecha.weighted_sum(a, a, alpha=long)):
        assert sd_mecha.deserialize(sd_mecha.serialize(recipe, finalize=False)) == recipe
        with refused(RecipeTypeError, says=["got 20001 bits, expected at most 14000"]):
            sd_mecha.merge(recipe)


def test_what_text_cannot_hold_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    missing = sd_mecha.model(tmp_path / "gone")
    with refused(RecipeTypeError, TypeError, says=["in memory", "save its tensors"]):
        sd_mecha.serialize(sd_mecha.weighted_sum(missing, sd_mecha.model({"w": torch.ones(1)})))
    with refused(RecipeTypeError, TypeError, says=["tensor"]):
        sd_mecha.serialize(sd_mecha.weighted_sum(missing, missing, alpha=torch.ones(2)))


def test_conversions_that_do_not_exist_name_both_ends(a: Path) -> None:
    with refused(ConfigError, says=["unknown config", "sd1-ldm"]):
        sd_mecha.convert(sd_mecha.model(a), "sd1-ldm")
