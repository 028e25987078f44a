"""What an optimiser written for 1.0.x calls, as far as it still exists.

Not offered: `open_input_dicts` and the `model_dirs=` and `check_mandatory_keys=` arguments of `merge` and `convert`;
`open_graph`, `extensions.model_dirs.add_path` and `strict_mandatory_keys=` took their places.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from sd_mecha import add_difference, deserialize, infer_model_configs, merge, merge_method, model, subtract
from sd_mecha.extensions import merge_spaces, model_configs
from sd_mecha.extensions.merge_methods import (
    MergeMethod,
    Parameter,
    ParameterData,
    RecipeNodeOrValue,
    Return,
    StateDict,
    T,
    get_all_converters,
    resolve,
)
from sd_mecha.extensions.merge_spaces import MergeSpace
from sd_mecha.extensions.model_configs import KeyMetadata, ModelConfig, ModelConfigImpl
from sd_mecha.recipe_nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode, RecipeVisitor
from sd_mecha.serialization import serialize
from sd_mecha.streaming import StateDictKeyError


def state(value: float) -> dict[str, Tensor]:
    return {"x": torch.tensor([value])}


def test_methods_made_from_functions() -> None:
    def fn(a: Parameter(Tensor), b: Parameter(StateDict[T]) = 1.0, **kwargs: Any) -> Return(Tensor):
        return a * 2

    method = merge_method(fn, identifier="optimiser_made", register=False)
    assert isinstance(method, MergeMethod)
    assert method.__wrapped__ is fn
    assert method.get_param_names().as_dict(2) == {0: "a", 1: "b"}
    assert all(isinstance(data, ParameterData) for data in method.get_params().args)
    assert method.get_input_types().args == [Tensor, StateDict[T]]
    weight = merge_spaces.resolve("weight")
    assert isinstance(weight, MergeSpace)
    assert method.get_return_merge_space([weight, merge_spaces.resolve("param")], {}) == weight
    assert merge(method(model(state(3.0))))["x"].tolist() == [6.0]


def test_differences_with_alpha() -> None:
    base, tuned = model(state(1.0)), model(state(3.0))
    assert merge(add_difference(base, subtract(tuned, base), alpha=0.5))["x"].tolist() == [2.0]


def test_nodes_show_what_they_are_made_of() -> None:
    node = resolve("weighted_sum")(model("a.safetensors"), model(state(1.0)), alpha=0.25)
    assert isinstance(node, MergeRecipeNode)
    assert node.merge_method is resolve("weighted_sum")
    first, second, alpha = node.args
    assert node.kwargs == {}
    assert isinstance(first, ModelRecipeNode)
    assert (first.path, first.state_dict) == ("a.safetensors", None)
    assert (second.path, second.state_dict["x"].tolist()) == (None, [1.0])
    (literal,) = alpha.args
    assert isinstance(literal, LiteralRecipeNode)
    assert literal.value == {"key": 0.25}


def test_text_as_lines() -> None:
    recipe = resolve("weighted_sum")(model("a.safetensors"), model("b.safetensors"), alpha=0.25)
    text = serialize(recipe, finalize=False)
    assert text.splitlines()[0] == "version 0.1.0"
    assert {line.split()[0] for line in text.splitlines()[1:]} == {"dict", "model", "literal", "merge"}
    assert deserialize(text.splitlines()) == deserialize(text) == recipe


def test_configs_of_state_dicts() -> None:
    found = infer_model_configs(["model.diffusion_model.input_blocks.0.0.bias"])
    assert all(isinstance(group, set) for group in found)
    assert model_configs.resolve("sd1-ldm") in set().union(*found)


def test_a_config_of_ones_own() -> None:
    fields = {"identifier": "optimiser-own", "components": {"all": {"x": KeyMetadata([1])}}}
    config = ModelConfigImpl(**fields)
    model_configs.register_aux(config)
    try:
        assert isinstance(model_configs.resolve("optimiser-own"), ModelConfig)
        assert config.components()["all"].keys()["x"].shape == (1,)
        assert merge(model(state(2.0), "optimiser-own"))["x"].tolist() == [2.0]
    finally:
        model_configs.unregister("optimiser-own")


def test_names_that_are_imported() -> None:
    assert issubclass(StateDictKeyError, KeyError)
    assert isinstance(model("a.safetensors"), RecipeNode)
    assert RecipeNodeOrValue is not None
    assert {"visit_literal", "visit_model", "visit_merge"} <= set(dir(RecipeVisitor))
    assert get_all_converters()
    with pytest.raises(KeyError):
        resolve("no such method")
