from __future__ import annotations

import copy
import gc
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sd_mecha.errors import RecipeTypeError, UnknownNameError
from sd_mecha.recipes import provider
from sd_mecha.recipes.building import literal, model
from sd_mecha.recipes.nodes import (
    LiteralRecipeNode,
    MergeRecipeNode,
    ModelRecipeNode,
    RecipeNode,
    RecipeVisitor,
)
from tests.recipes.fakes import FakeMethod, FakeProvider, Name


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    return provider.current().method(name)(*args, **kwargs)


class TestEquality:
    def test_built_twice_is_equal_and_hashes_alike(self) -> None:
        def build() -> RecipeNode:
            return call("weighted_sum", model("a.safetensors"), model("b.safetensors"), alpha=0.3)

        assert build() == build()
        assert {build(): 1}[build()] == 1

    @pytest.mark.parametrize(
        "other",
        [
            ModelRecipeNode("b", None, Name("weight")),
            ModelRecipeNode("a"),
            ModelRecipeNode("a", Name("x"), Name("weight")),
            ModelRecipeNode("a", None, Name("delta")),
            LiteralRecipeNode({"a": 1}, None, Name("weight")),
        ],
    )
    def test_models_differ_by_path_config_and_space(self, other: RecipeNode) -> None:
        assert ModelRecipeNode("a", None, Name("weight")) != other

    def test_values_of_different_type_or_sign_differ(self) -> None:
        values = [None, False, True, 0, 1, 0.0, -0.0, 1.0, "", "1", "None", "null", float("inf"), 10**5000]
        nodes = {LiteralRecipeNode({"key": value}) for value in values}
        assert len(nodes) == len(values)

    def test_nan_equals_nan(self) -> None:
        assert LiteralRecipeNode({"k": float("nan")}) == LiteralRecipeNode({"k": -float("nan")})

    def test_order_of_keys_does_not_matter_but_what_they_hold_does(self) -> None:
        a, b = model("a"), model("b")
        assert LiteralRecipeNode({"x": a, "y": b}) == LiteralRecipeNode({"y": b, "x": a})
        assert LiteralRecipeNode({"x": a, "y": b}) != LiteralRecipeNode({"x": b, "y": a})

    def test_order_and_names_of_arguments_matter(self) -> None:
        a, b = model("a"), model("b")
        method = provider.current().method("ties_sum")
        built = [
            MergeRecipeNode.of(method, (a, b), {}),
            MergeRecipeNode.of(method, (b, a), {}),
            MergeRecipeNode.of(method, (a,), {"k": b}),
            MergeRecipeNode.of(method, (a,), {"vote_sgn": b}),
            MergeRecipeNode.of(method, (), {"k": a, "vote_sgn": b}),
        ]
        assert len(set(built)) == len(built)

    def test_tensors_and_models_in_memory_count_by_identity(self) -> None:
        tensor = torch.ones(2)
        assert LiteralRecipeNode({"k": tensor}) == LiteralRecipeNode({"k": tensor})
        assert LiteralRecipeNode({"k": tensor}) != LiteralRecipeNode({"k": tensor.clone()})
        state = {"w": tensor}
        assert model(state) == model(state)
        assert model(state) != model(dict(state))

    def test_methods_that_share_a_name_do_not_share_nodes(self) -> None:
        one, other = FakeProvider().method("subtract"), FakeProvider().method("subtract")
        a, b = model("a"), model("b")
        assert one(a, b) == one(a, b)
        assert one(a, b) != other(a, b)

    def test_other_objects_are_asked_in_turn(self) -> None:
        assert model("a").__eq__("a") is NotImplemented
        assert model("a") != "a"

    def test_a_node_is_truthy(self) -> None:
        assert LiteralRecipeNode({})

    def test_lone_surrogates_can_be_hashed(self) -> None:
        assert model("\ud800") != model("\ud801")


class TestModel:
    def test_path_and_str_are_one_model(self) -> None:
        assert model(Path("x/a b.safetensors")).path == model("./x//a b.safetensors").path == "x/a b.safetensors"

    def test_an_address_keeps_its_slashes(self) -> None:
        assert model("https://host/a.safetensors").path == "https://host/a.safetensors"

    def test_in_memory(self) -> None:
        state = {"w": torch.ones(1)}
        node = model(state)
        assert node.path is None
        assert node.state_dict is state

    def test_names_are_resolved(self) -> None:
        node = model("a", "sdxl-sgm")
        assert node.model_config == Name("sdxl-sgm")
        assert node.merge_space == Name("weight")
        with pytest.raises(UnknownNameError, match="unknown model config 'nope'"):
            model("a", "nope")

    def test_other_types_are_refused(self) -> None:
        with pytest.raises(RecipeTypeError, match="a model is a path, a dict of tensors or a torch module, not int"):
            model(5)  # type: ignore[arg-type]


class TestLiteral:
    def test_one_value_stands_for_all_keys(self) -> None:
        node = literal(0.5, merge_space="param")
        single = LiteralRecipeNode({"key": 0.5}, Name("singleton-mecha"), Name("param"))
        assert node == call("convert_singleton", single)
        assert literal(0.5, "singleton-mecha", "param") == single

    def test_a_dict_keeps_its_keys(self) -> None:
        node = literal({"a": 1}, "sd1-blocks")
        assert node == LiteralRecipeNode({"a": 1}, Name("sd1-blocks"))

    def test_the_dict_is_copied(self) -> None:
        values = {"a": 1}
        node = LiteralRecipeNode(values)
        values["a"] = 2
        assert node.value_dict == node.value == {"a": 1}

    def test_a_node_stays_as_it_is(self) -> None:
        node = model("a")
        assert literal(node) is node
        with pytest.raises(RecipeTypeError, match="is a node already"):
            literal(node, "sdxl-sgm")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([1], "literal value at key 'key': got list"),
            ({"w": {"nested": 1}}, "literal value at key 'w': got dict"),
            ({1: 2}, "the keys of a literal are str, got int: 1"),
        ],
    )
    def test_other_types_are_refused(self, value: Any, message: str) -> None:
        with pytest.raises(RecipeTypeError, match=message):
            literal(value)


class TestMerge:
    def test_bound_args_and_back(self) -> None:
        node = call("ties_sum", model("a"), model("b"), k=0.2)
        bound = node.bound_args
        assert isinstance(bound, inspect.BoundArguments)
        assert bound.arguments["models"] == (model("a"), model("b"))
        assert MergeRecipeNode(node.merge_method, bound) == node

    def test_arguments(self) -> None:
        node = call("ties_sum", model("a"), model("b"))
        assert node.args == (model("a"), model("b"))
        assert list(node.kwargs) == ["k", "vote_sgn"]
        assert node.children == (*node.args, *node.kwargs.values())

    def test_values_are_refused_where_nodes_belong(self) -> None:
        method = provider.current().method("subtract")
        with pytest.raises(RecipeTypeError, match="'subtract': the arguments of a merge node are nodes, got float"):
            MergeRecipeNode.of(method, (model("a"), 0.5), {})  # type: ignore[arg-type]

    def test_cache_is_what_the_method_declares(self) -> None:
        a, b = model("a"), model("b")
        node = call("rotate", a, b)
        assert node.create_cache() == {}
        assert node.create_cache() is not node.create_cache()
        assert call("subtract", a, b).create_cache() is None


class TestOperators:
    def test_each_calls_its_method(self) -> None:
        a, b = model("a"), model("b", merge_space="delta")
        assert a + b == call("add_difference", a, b)
        assert a - b == call("subtract", a, b)
        assert a * 0.5 == 0.5 * a == call("scale", a, 0.5)
        assert a | b == call("fallback", a, b)

    def test_reflected(self) -> None:
        a = model("a")
        assert 1.0 + a == call("add_difference", 1.0, a)
        assert 1.0 - a == call("subtract", 1.0, a)
        assert {"w": 1.0} | a == call("fallback", {"w": 1.0}, a)

    def test_numpy_and_torch_scalars_on_the_left(self) -> None:
        a, tensor = model("a"), torch.ones(())
        assert np.float64(2) * a == call("scale", a, np.float64(2))
        assert tensor * a == call("scale", a, tensor)

    def test_to_is_cast(self) -> None:
        a = model("a")
        assert a.to(dtype=torch.float16) == a.to(dtype="float16") == call("cast", a, device=None, dtype="float16")
        assert a.to(device=torch.device("cpu")) == call("cast", a, device="cpu", dtype=None)


class TestFrozen:
    def test_attributes_cannot_change(self) -> None:
        node = model("a")
        with pytest.raises(AttributeError, match="frozen"):
            node.merge_space = None
        with pytest.raises(AttributeError, match="frozen"):
            del node.path
        assert node == model("a")

    def test_copies_are_the_node_itself(self) -> None:
        node = model({"w": torch.ones(1)})
        assert copy.copy(node) is copy.deepcopy(node) is node


class TestContainsAndIteration:
    def test_membership_is_structural(self) -> None:
        recipe = call("weighted_sum", model("a"), LiteralRecipeNode({"w": model("b")}))
        assert model("b") in recipe
        assert recipe in recipe
        assert model("c") not in recipe
        assert "a" not in recipe

    def test_post_order_each_once(self) -> None:
        a, b = model("a"), model("b")
        d = a - b
        recipe = (a + d) | (a + d)
        nodes = list(recipe)
        assert nodes[0] == a
        assert nodes[-1] == recipe
        assert len(nodes) == len(set(nodes))
        for position, node in enumerate(nodes):
            assert all(child in nodes[:position] for child in node.children)

    def test_visitor(self) -> None:
        class Kind(RecipeVisitor):
            def visit_literal(self, node: LiteralRecipeNode, *args: Any, **kwargs: Any) -> str:
                return "literal"

            def visit_model(self, node: ModelRecipeNode, *args: Any, **kwargs: Any) -> str:
                return f"model {args} {kwargs}"

            def visit_merge(self, node: MergeRecipeNode, *args: Any, **kwargs: Any) -> str:
                return "merge"

        assert model("a").accept(Kind(), 1, x=2) == "model (1,) {'x': 2}"
        assert LiteralRecipeNode({}).accept(Kind()) == "literal"
        assert (model("a") - model("b")).accept(Kind()) == "merge"


class TestRepr:
    def test_short(self) -> None:
        node = model("a") - model("b")
        assert repr(node) == "<merge 'subtract' of model 'a', model 'b'>"
        assert repr(model({"w": torch.ones(1)})) == "<model in memory (1 keys)>"
        assert repr(LiteralRecipeNode({"a": 1, "b": "x"})) == "<literal {'a': 1, 'b': 'x'}>"

    def test_bounded(self) -> None:
        wide = call("n_average", *[model("m" * 1000 + str(i)) for i in range(100)])
        big = LiteralRecipeNode({"k" * 1000 + str(i): 10**9999 for i in range(100)})
        assert len(repr(wide)) < 500
        assert len(repr(big)) < 500


def test_deep_recipes_can_be_dropped() -> None:
    node: RecipeNode = model("a")
    for _ in range(100_000):
        node = node - node
    assert hash(node)
    del node
    gc.collect()


def test_a_method_keeps_its_name_when_the_first_of_that_name_is_gone(fakes: FakeProvider) -> None:
    a = ModelRecipeNode("a")
    first, second = (FakeMethod("same name", lambda x: None, fakes.wrap) for _ in range(2))
    first(a)
    before = second(a)
    del first
    gc.collect()
    assert second(a) == before
