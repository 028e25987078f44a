"""Conversions: what may be one, and how `convert` finds its way."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha import convert
from sd_mecha.errors import ConfigError, RecipeTypeError, UnknownNameError
from sd_mecha.extensions import merge_methods
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, T, merge_method
from sd_mecha.extensions.model_configs import ModelConfig
from tests.extensions.support import config, model, numbers, registered, removed_afterwards, run

A, B, C, D = (config(f"{name}-test", *(f"{name}{i}" for i in range(3))) for name in "abcd")


def conversion(source: ModelConfig, target: ModelConfig, add: float) -> Any:
    """A conversion that renames keys by their place and adds a number, so that its use can be seen."""

    class rename:
        @staticmethod
        def map_keys(builder: Any) -> None:
            for key, other in zip(builder.out.keys(), builder.m.keys(), strict=True):
                builder[key] = builder.m.keys[other]

        def __call__(self, m: Parameter(StateDict[Tensor], model_config=source), **kwargs: Any) -> Return(
            Tensor, model_config=target
        ):
            (key,) = kwargs["key_relation"].inputs["m"]
            return m[key] + add

    identifier = f"convert_{source.identifier}_to_{target.identifier}"
    return merge_method(is_conversion=True, identifier=identifier)(rename)


@pytest.fixture(autouse=True)
def _graph() -> Iterator[None]:
    """a -> b -> c -> d, and a short cut a -> c."""
    edges = [(A, B, 1.0), (B, C, 10.0), (A, C, 100.0), (C, D, 1000.0)]
    names = [f"convert_{source.identifier}_to_{target.identifier}" for source, target, _ in edges]
    with registered(A, B, C, D), removed_afterwards(*names):
        for source, target, add in edges:
            conversion(source, target, add)
        yield


def ones(name: str) -> Any:
    return model(**{f"{name}{i}": 1.0 for i in range(3)})


def chain(node: Any) -> list[str]:
    """The conversions around a recipe, the first applied first."""
    found: list[str] = []
    while hasattr(node, "merge_method") and node.merge_method.is_conversion:
        found.insert(0, node.merge_method.identifier)
        (node,) = node.args
    return found


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("a", "a-test", []),
        ("a", "b-test", ["convert_a-test_to_b-test"]),
        ("a", "c-test", ["convert_a-test_to_c-test"]),
        ("a", "d-test", ["convert_a-test_to_c-test", "convert_c-test_to_d-test"]),
        ("b", "d-test", ["convert_b-test_to_c-test", "convert_c-test_to_d-test"]),
    ],
)
def test_the_shortest_chain_is_found(source: str, target: str, expected: list[str]) -> None:
    assert chain(convert(ones(source), target)) == expected


def test_a_chain_gives_the_numbers_of_its_steps() -> None:
    assert numbers(convert(ones("a"), "d-test")) == {"d0": 1101.0, "d1": 1101.0, "d2": 1101.0}


def test_a_recipe_that_is_there_already_is_returned_as_it_is() -> None:
    node = ones("c")
    assert convert(node, C) is node


@pytest.mark.parametrize("target", ["c-test", C])
def test_the_target_is_a_name_or_a_config(target: Any) -> None:
    assert chain(convert(ones("b"), target)) == ["convert_b-test_to_c-test"]


def test_the_target_may_be_a_recipe() -> None:
    target = sd_mecha.weighted_sum(ones("c"), ones("c"), alpha=0.5)
    converted = convert(ones("a"), target)
    assert numbers(sd_mecha.weighted_sum(converted, target, alpha=0.5)) == {f"c{i}": 51.0 for i in range(3)}
    assert chain(convert(ones("a"), model("d-test", d0=1.0))) == [
        "convert_a-test_to_c-test",
        "convert_c-test_to_d-test",
    ]


def test_a_source_that_may_be_several_configs_takes_the_shortest_way_from_any() -> None:
    vague = model(a0=1.0, b0=1.0, **{f"a{i}": 1.0 for i in (1, 2)})
    assert chain(convert(vague, "b-test")) == []
    assert chain(convert(vague, "c-test")) in (["convert_a-test_to_c-test"], ["convert_b-test_to_c-test"])


def test_merges_are_converted_as_a_whole() -> None:
    recipe = sd_mecha.weighted_sum(ones("a"), ones("a"), alpha=0.5)
    assert numbers(convert(recipe, "b-test")) == {f"b{i}": 2.0 for i in range(3)}


def test_dicts_are_converted_by_their_keys() -> None:
    alpha = convert({"a0": 0.0, "a1": 0.25, "a2": 1.0}, "b-test")
    assert chain(alpha) == ["convert_a-test_to_b-test"]


def test_defaults_convert_as_well() -> None:
    node = ones("a")
    assert sd_mecha.Defaults().convert(node, "c-test") == convert(node, "c-test")


def test_without_a_way_both_ends_are_named() -> None:
    with pytest.raises(ConfigError, match="no conversion leads from d-test to a-test"):
        convert(ones("d"), "a-test")
    with pytest.raises(ConfigError, match="no conversion leads from an unknown config to a-test"):
        convert(model(unheard_of=1.0), "a-test")
    with pytest.raises(UnknownNameError, match="did you mean 'a-test'"):
        convert(ones("a"), "a-tset")


def test_converters_are_listed() -> None:
    names = [method.identifier for method in merge_methods.get_all_converters()]
    assert {"convert_a-test_to_b-test", "convert_sd1_blocks_to_ldm"} <= set(names)
    assert "convert_singleton" not in names
    assert "weighted_sum" not in names
    assert [target for target, _ in merge_methods.get_converter_paths()["a-test"]] == ["b-test", "c-test"]


def test_block_weights_reach_a_checkpoint() -> None:
    keys = ("model.diffusion_model.input_blocks.0.0.bias", "model.diffusion_model.out.2.bias")
    base = sd_mecha.model(dict.fromkeys(keys, torch.tensor([0.0])), "sd1-ldm")
    other = sd_mecha.model(dict.fromkeys(keys, torch.tensor([8.0])), "sd1-ldm")
    blocks = {"BASE": 0.0, "IN00": 0.25, "OUT11": 1.0, "M00": 0.5}
    merged = numbers(sd_mecha.weighted_sum(base, other, alpha=convert(blocks, base)))
    assert merged == {keys[0]: [2.0], keys[1]: [8.0]}


def test_a_generic_conversion_has_no_target() -> None:
    @merge_method(register=False, is_conversion=True)
    class broadcast:
        @staticmethod
        def map_keys(builder: Any) -> None:
            for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
                builder[key] = builder.m.keys["a0"]

        def __call__(self, m: Parameter(StateDict[T], model_config=A)) -> Return(T):
            return m["a0"]

    recipe = sd_mecha.weighted_sum(model(p=0.0, q=0.0), model(p=8.0, q=8.0), broadcast({"a0": 0.5}))
    assert numbers(recipe) == {"p": 4.0, "q": 4.0}


# --- what may be a conversion -----------------------------------------------------------------------------------------


def plain(m: Parameter(Tensor, model_config=A)) -> Return(Tensor, model_config=B):
    return m


def two(a: Parameter(StateDict[Tensor], model_config=A), b: Parameter(Tensor)) -> Return(Tensor, model_config=B):
    return b


def several(*a: Parameter(StateDict[Tensor], model_config=A)) -> Return(Tensor, model_config=B):
    return a[0]["a0"]


def sourceless(a: Parameter(StateDict[Tensor])) -> Return(Tensor, model_config=B):
    return a["a0"]


def targetless(a: Parameter(StateDict[Tensor], model_config=A)) -> Return(Tensor):
    return a["a0"]


def circular(a: Parameter(StateDict[Tensor], model_config=A)) -> Return(Tensor, model_config=A):
    return a["a0"]


@pytest.mark.parametrize(
    ("fn", "complaint"),
    [
        (plain, "expected exactly one positional parameter, a StateDict"),
        (two, "expected exactly one positional parameter, a StateDict"),
        (several, "expected exactly one positional parameter, a StateDict"),
        (sourceless, "the parameter names no model config"),
        (targetless, "the result must name a model config other than a-test"),
        (circular, "the result must name a model config other than a-test"),
    ],
)
def test_a_conversion_takes_one_state_dict_to_another_config(fn: Any, complaint: str) -> None:
    with pytest.raises(RecipeTypeError, match=f"conversion {fn.__name__}: {complaint}"):
        merge_method(register=False, is_conversion=True)(fn)


def test_a_conversion_may_have_named_options() -> None:
    @merge_method(register=False, is_conversion=True)
    class with_option:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["b0"] = builder.m.keys["a0"]

        def __call__(self, m: Parameter(StateDict[Tensor], model_config=A), *, by: Parameter(float) = 2.0) -> Return(
            Tensor, model_config=B
        ):
            return m["a0"] * by

    assert numbers(with_option(ones("a"))) == {"b0": 2.0}
    assert run(with_option(ones("a"), by=5.0))["b0"] == 5
