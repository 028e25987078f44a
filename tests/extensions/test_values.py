"""Python values in recipes: what they become, where they are refused, and operators with them."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sd_mecha
from sd_mecha import value_to_node
from sd_mecha.errors import ConfigError, MergeSpaceError, RecipeTypeError
from sd_mecha.extensions import merge_methods
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method
from sd_mecha.recipe_nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from tests.extensions.support import config, model, numbers, registered


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "text", torch.tensor(2.0), torch.ones(2, 2)])
def test_a_scalar_becomes_a_broadcast_singleton(value: Any) -> None:
    node = value_to_node(value)
    assert isinstance(node, MergeRecipeNode)
    assert node.merge_method.identifier == "convert_singleton"
    (literal,) = node.args
    assert isinstance(literal, LiteralRecipeNode)
    assert literal.value_dict["key"] is value
    assert literal.model_config.identifier == "singleton-mecha"
    assert literal.merge_space is None


def test_a_node_stays_what_it_is() -> None:
    node = model(x=1.0)
    assert value_to_node(node) is node
    assert sd_mecha.literal(node) is node


def test_a_dict_becomes_a_literal() -> None:
    node = value_to_node({"a": 1, "b": 0.5})
    assert isinstance(node, LiteralRecipeNode)
    assert (node.value_dict, node.model_config, node.merge_space) == ({"a": 1, "b": 0.5}, None, None)


def test_other_mappings_do_as_well() -> None:
    given = OrderedDict(a=1)
    node = value_to_node(given)
    given["b"] = 2
    assert node.value_dict == {"a": 1}


def test_a_path_becomes_a_model_and_text_stays_text(tmp_path: Path) -> None:
    node = value_to_node(Path("some") / "model.safetensors")
    assert isinstance(node, ModelRecipeNode)
    assert node.path == "some/model.safetensors"
    assert node.merge_space.identifier == "weight"
    assert not isinstance(value_to_node("model.safetensors"), ModelRecipeNode)
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.tensor([2.0])}, file)
    assert numbers(sd_mecha.weighted_sum(file, model(x=[4.0]), alpha=0.5)) == {"x": [3.0]}


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([1.0], "a list cannot stand in a recipe"),
        (object(), "a object cannot stand in a recipe"),
        (b"bytes", "a bytes cannot stand in a recipe"),
        ({1: 2.0}, "keys of a dict in a recipe must be str, not int"),
        ({"a": 1, "b": "text"}, "mixes number, str"),
        ({"a": 1.0, "b": True}, "mixes bool, number"),
        ({"a": 1.0, "b": None}, "mixes NoneType, number"),
        ({"a": torch.ones(1), "b": 1.0}, "mixes Tensor, number"),
        ({"a": [1.0]}, "a list cannot stand in a recipe"),
        ({"a": {"b": 1.0}}, "a dict cannot stand in a recipe"),
    ],
)
def test_what_cannot_stand_in_a_recipe(value: Any, complaint: str) -> None:
    with pytest.raises(RecipeTypeError, match=complaint):
        value_to_node(value)


def test_the_expected_type_is_checked() -> None:
    assert value_to_node(1, float) == value_to_node(1)
    assert value_to_node("x", str) == value_to_node("x")
    for value, wanted in [("x", float), ("x", Tensor), ("x", StateDict[Tensor]), (1, str), ({"a": 1}, str)]:
        with pytest.raises(RecipeTypeError, match="cannot be cast to"):
            value_to_node(value, wanted)


# --- dicts of nodes ---------------------------------------------------------------------------------------------------


def test_a_dict_of_nodes_chooses_by_key() -> None:
    a, b = model(x=1.0, y=2.0), model(x=10.0, y=20.0)
    assert numbers({"x": a, "y": b}) == {"x": 1.0, "y": 20.0}
    assert numbers(sd_mecha.literal({"x": a, "y": sd_mecha.n_average(a, b)})) == {"x": 1.0, "y": 11.0}
    assert numbers(sd_mecha.weighted_sum({"x": a, "y": b}, {"x": b, "y": a}, 0.5)) == {"x": 5.5, "y": 11.0}


def test_a_key_that_its_node_cannot_make_is_left_out() -> None:
    assert numbers({"x": model(x=1.0), "y": model(x=1.0)}) == {"x": 1.0}


def test_a_dict_of_param_nodes_steers() -> None:
    alpha = {"x": model(_space="param", x=0.25, y=0.0), "y": model(_space="param", x=0.0, y=1.0)}
    assert numbers(sd_mecha.weighted_sum(model(x=0.0, y=0.0), model(x=8.0, y=8.0), alpha)) == {"x": 2.0, "y": 8.0}


def test_nodes_of_a_dict_must_agree() -> None:
    with registered(config("one-test", "x"), config("two-test", "x")):
        one, two = model("one-test", x=1.0), model("two-test", x=1.0)
        with pytest.raises(RuntimeError, match="nodes of a dict differ in model_config: one-test, two-test"):
            value_to_node({"x": one, "y": two})
    with pytest.raises(RuntimeError, match="nodes of a dict differ in merge_space: delta, weight"):
        value_to_node({"x": model(x=1.0), "y": model(_space="delta", x=1.0)})
    with pytest.raises(TypeError, match="mixes recipe nodes with plain values"):
        value_to_node({"x": model(x=1.0), "y": 1.0})


def test_nodes_that_turn_out_to_disagree_are_found_while_planning() -> None:
    a = model(x=1.0, y=1.0)
    with pytest.raises(MergeSpaceError, match=r"weight.*delta|delta.*weight"):
        numbers({"x": a, "y": a - a})


# --- one number in several places -------------------------------------------------------------------------------------


def test_one_number_may_be_a_weight_here_and_a_parameter_there() -> None:
    with registered(config("tiny-test", "x", "y")):
        a, b = model("tiny-test", x=1.0), model("tiny-test", x=5.0)
        recipe = sd_mecha.weighted_sum(a, b, alpha=0.5) | 0.5
        assert numbers(recipe) == {"x": 3.0, "y": 0.5}
        with sd_mecha.plan(recipe) as planned:
            assert planned.finalized().merge_space.identifier == "weight"


def test_one_number_may_be_a_weight_here_and_a_delta_there() -> None:
    with registered(config("tiny-test", "x", "y")):
        a = model("tiny-test", x=1.0, y=2.0)
        delta = (a - model("tiny-test", x=3.0)) | 0.25
        assert numbers(sd_mecha.add_difference(model("tiny-test", y=1.0) | 0.25, delta)) == {"x": -1.75, "y": 1.25}


@merge_method(register=False)
class from_blocks:
    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
            builder[key] = builder.blocks.keys["all"]

    def __call__(self, blocks: Parameter(StateDict[Tensor], model_config=config("blocks-test", "all"))) -> Return(
        Tensor, model_config=config("whole-test", "x", "y")
    ):
        return blocks["all"]


def test_one_number_may_steer_models_of_two_configs() -> None:
    blocks = from_blocks.get_input_configs().args[0]
    whole = from_blocks.declaration.result.model_config
    with registered(blocks, whole):
        one, two = model("blocks-test", all=2.0), model("blocks-test", all=4.0)
        grown = from_blocks(sd_mecha.weighted_sum(one, two, alpha=0.5))
        recipe = sd_mecha.weighted_sum(grown, model("whole-test", x=1.0, y=7.0), alpha=0.5)
        assert numbers(recipe) == {"x": 2.0, "y": 5.0}
        with sd_mecha.open_graph(recipe) as graph:
            assert graph.finalize_root().model_config is whole


def test_caches_find_users_of_such_numbers() -> None:
    seen = []

    @merge_method(register=False, cache_factory=dict)
    def cached(a: Parameter(Tensor), b: Parameter(Tensor) = 0.5, **kwargs: Any) -> Return(Tensor):
        seen.append(kwargs["cache"])
        return a * b

    node = cached(model(x=4.0))
    cache = {node: {"mine": True}}
    assert numbers(sd_mecha.literal({"x": node}) | 0.5, cache=cache) == {"x": 2.0}
    assert {"mine": True} in seen


# --- operators --------------------------------------------------------------------------------------------------------


def test_operators_between_nodes() -> None:
    a, b = model(x=5.0), model(x=3.0)
    assert (a - b) == sd_mecha.subtract(a, b)
    assert (a + (a - b)) == merge_methods.resolve("add_difference")(a, a - b)
    assert (a | b) == sd_mecha.fallback(a, b)
    assert numbers(a + (a - b) * 2) == {"x": 9.0}
    assert numbers(a + 0.5 * (a - b)) == {"x": 6.0}
    assert numbers(a | b) == {"x": 5.0}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (lambda a, d: a + 1.0, 6.0),
        (lambda a, d: 1.0 + d, 3.0),
        (lambda a, d: a - 1, 4.0),
        (lambda a, d: 1 - a, -4.0),
        (lambda a, d: d * 3, 6.0),
        (lambda a, d: 3 * d, 6.0),
        (lambda a, d: d * torch.tensor(0.5), 1.0),
        (lambda a, d: torch.tensor(0.5) * d, 1.0),
        (lambda a, d: a + {"x": 10.0}, 15.0),
        (lambda a, d: {"x": 10.0} - a, 5.0),
        (lambda a, d: d * {"x": 10.0}, 20.0),
        (lambda a, d: {"x": 10.0} * d, 20.0),
        (lambda a, d: a | 1.0, 5.0),
        (lambda a, d: {"x": 7.0} | a, 7.0),
    ],
)
def test_operators_take_numbers_tensors_and_dicts_on_either_side(recipe: Any, expected: float) -> None:
    a = model(x=5.0)
    assert numbers(recipe(a, model(_space="delta", x=2.0))) == {"x": expected}


def test_operators_refuse_what_is_no_value() -> None:
    with pytest.raises(RecipeTypeError):
        model(x=1.0) - [1.0]
    with pytest.raises(RecipeTypeError):
        "text" - model(x=1.0)


def test_literals_take_part_in_arithmetic() -> None:
    assert numbers(sd_mecha.weighted_sum(model(x=0.0), model(x=8.0), alpha=sd_mecha.literal({"x": 0.25}))) == {"x": 2.0}


def test_to_casts() -> None:
    node = model(x=1.0).to(dtype="float16")
    assert node.merge_method.identifier == "cast"
    assert sd_mecha.merge(node, output_dtype=None)["x"].dtype == torch.float16
    assert sd_mecha.merge(model(x=1.0).to(dtype=torch.bfloat16), output_dtype=None)["x"].dtype == torch.bfloat16
    assert numbers(model(x=1.0).to(device="cpu")) == {"x": 1.0}


def test_node_in_recipe() -> None:
    a, b = model(x=1.0), model(x=2.0)
    recipe = sd_mecha.weighted_sum(a, b, alpha=0.5)
    assert a in recipe
    assert recipe in recipe
    assert value_to_node(0.5) in recipe
    assert model(x=1.0) not in recipe
    order = list(recipe)
    assert order[-1] is recipe
    assert order.index(a) < order.index(b) < len(order) - 1


# --- literal() --------------------------------------------------------------------------------------------------------


def test_a_literal_may_have_a_config_and_a_space() -> None:
    with registered(config("tiny-test", "x")):
        node = sd_mecha.literal({"x": 1.0}, "tiny-test", "delta")
        assert (node.model_config.identifier, node.merge_space.identifier) == ("tiny-test", "delta")
    with pytest.raises(RecipeTypeError, match="is a node already"):
        sd_mecha.literal(model(x=1.0), merge_space="delta")


def test_a_scalar_literal_broadcasts() -> None:
    node = sd_mecha.literal(0.5)
    assert isinstance(node, RecipeNode)
    assert node == value_to_node(0.5)
    assert numbers(sd_mecha.weighted_sum(model(x=0.0), model(x=8.0), alpha=node)) == {"x": 4.0}


def test_a_recipe_of_numbers_alone_has_no_keys() -> None:
    with pytest.raises(RuntimeError, match="the recipe makes no key: it holds no model"):
        numbers(sd_mecha.literal(0.5))


def test_a_dict_whose_keys_fit_another_config_is_refused() -> None:
    with registered(config("one-test", "x", "y"), config("two-test", "p", "q")):
        one = model("one-test", x=1.0, y=1.0)
        with pytest.raises(ConfigError, match=r"config one-test does not fit .*literal"):
            numbers(sd_mecha.weighted_sum(one, one, alpha={"p": 1.0}))
