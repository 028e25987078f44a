"""Interfaces: a call becomes a call of the first implementation that fits the configs and merge spaces."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import sd_mecha
from sd_mecha.errors import MergeSpaceError, RecipeTypeError
from sd_mecha.extensions.merge_methods import (
    CandidateDispatchError,
    MergeMethodInterface,
    Parameter,
    Return,
    StateDict,
    merge_method,
)
from tests.extensions.support import config, model, numbers, registered, run

ONE = config("one-test", "a", "b")
TWO = config("two-test", "x", "y")
BOTH = config("both-test", "a", "x")


@pytest.fixture(autouse=True)
def _configs() -> Iterator[None]:
    with registered(ONE, TWO):
        yield


@merge_method(register=False, is_interface=True)
def grow(a: Parameter(Tensor), by: Parameter(float) = 1.0) -> Return(Tensor):
    """Add something."""


@merge_method(register=False, implements=grow)
def grow_one(a: Parameter(Tensor, model_config=ONE), by: Parameter(float, model_config=ONE) = 1.0) -> Return(
    Tensor, model_config=ONE
):
    return a + by


@merge_method(register=False, implements=grow)
def grow_two(a: Parameter(Tensor, model_config=TWO), by: Parameter(float) = 1.0) -> Return(Tensor, model_config=TWO):
    return a + 10 * by


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 3.0}), ({"x": 1.0, "y": 2.0}, {"x": 11.0, "y": 12.0})],
)
def test_the_config_of_the_input_picks_the_implementation(values: Any, expected: Any) -> None:
    assert numbers(grow(model(**values))) == expected


def test_a_declared_config_picks_it_too() -> None:
    assert numbers(grow(model("two-test", x=1.0))) == {"x": 11.0}


def test_arguments_are_handed_on() -> None:
    assert numbers(grow(model(a=1.0, b=2.0), 5)) == {"a": 6.0, "b": 7.0}
    assert numbers(grow(model(a=1.0, b=2.0), {"a": 5, "b": 6})) == {"a": 6.0, "b": 8.0}


def test_calls_nest() -> None:
    a = model(x=1.0, y=2.0)
    assert numbers(grow(grow(a), 2)) == {"x": 31.0, "y": 32.0}
    assert numbers(sd_mecha.weighted_sum(grow(a), a, alpha=0.5)) == {"x": 6.0, "y": 7.0}


def test_one_recipe_may_need_several_implementations() -> None:
    class joined:
        @staticmethod
        def map_keys(builder: Any) -> None:
            for key, other in zip(builder.out.keys(), builder.m.keys(), strict=True):
                builder[key] = builder.m.keys[other]

        def __call__(self, m: Parameter(StateDict[Tensor], model_config=TWO), **kwargs: Any) -> Return(
            Tensor, model_config=ONE
        ):
            (key,) = kwargs["key_relation"].inputs["m"]
            return m[key]

    convert = merge_method(register=False)(joined)
    assert numbers(grow(convert(grow(model(x=1.0, y=2.0))))) == {"a": 12.0, "b": 13.0}


def test_the_plan_shows_the_implementation() -> None:
    with sd_mecha.plan(grow(model(a=1.0, b=2.0)), strict_merge_space=None) as planned:
        assert planned.finalized().merge_method is grow_one


@pytest.mark.parametrize("values", [{"p": 1.0, "q": 2.0}, {f"p{i}": 1.0 for i in range(3)}])
def test_a_model_that_no_implementation_takes(values: Any) -> None:
    with pytest.raises(CandidateDispatchError) as error:
        run(grow(model(**values)))
    text = str(error.value)
    assert text.startswith("grow: no implementation fits (a: no known config")
    assert "implementations: grow_one" in text
    assert "grow_two" in text
    assert error.value.candidate_identifier == "grow"
    assert isinstance(error.value, TypeError)


def test_a_known_config_that_no_implementation_takes() -> None:
    with pytest.raises(CandidateDispatchError, match="a: singleton-mecha"):
        run(grow(sd_mecha.literal(1.0, "singleton-mecha", "weight")))


def test_an_interface_without_implementations() -> None:
    @merge_method(register=False, is_interface=True)
    def lonely(a: Parameter(Tensor)) -> Return(Tensor): ...

    with pytest.raises(CandidateDispatchError, match=r"lonely: no implementation fits .*implementations: none"):
        run(lonely(model(a=1.0, b=2.0)))


def test_the_first_implementation_that_fits_wins() -> None:
    @merge_method(register=False, is_interface=True)
    def pick(a: Parameter(Tensor)) -> Return(Tensor): ...

    @merge_method(register=False, implements=pick)
    def double(a: Parameter(Tensor, model_config=ONE)) -> Return(Tensor, model_config=ONE):
        return a * 2

    @merge_method(register=False, implements=pick)
    def triple(a: Parameter(Tensor, model_config=ONE)) -> Return(Tensor, model_config=ONE):
        return a * 3

    assert numbers(pick(model(a=1.0, b=1.0))) == {"a": 2.0, "b": 2.0}


def test_an_implementation_for_any_config_serves_as_the_last_resort() -> None:
    @merge_method(register=False, is_interface=True)
    def size(a: Parameter(Tensor)) -> Return(Tensor): ...

    @merge_method(register=False, implements=size)
    def size_one(a: Parameter(Tensor, model_config=ONE)) -> Return(Tensor, model_config=ONE):
        return a + 100

    @merge_method(register=False, implements=size)
    def size_any(a: Parameter(Tensor)) -> Return(Tensor):
        return a + 1

    assert numbers(size(model(a=1.0, b=1.0))) == {"a": 101.0, "b": 101.0}
    assert numbers(size(model(p=1.0))) == {"p": 2.0}


def test_merge_spaces_pick_the_implementation_too() -> None:
    @merge_method(register=False, is_interface=True)
    def describe(a: Parameter(Tensor, {"weight", "delta"})) -> Return(Tensor): ...

    @merge_method(register=False, implements=describe)
    def of_deltas(a: Parameter(Tensor, "delta", ONE)) -> Return(Tensor, "delta", ONE):
        return a * 0 + 1

    @merge_method(register=False, implements=describe)
    def of_weights(a: Parameter(Tensor, "weight", ONE)) -> Return(Tensor, "weight", ONE):
        return a * 0 + 2

    a = model(a=1.0, b=1.0)
    assert numbers(describe(a)) == {"a": 2.0, "b": 2.0}
    assert numbers(describe(a - a)) == {"a": 1.0, "b": 1.0}


def test_an_interface_looks_like_a_method() -> None:
    assert isinstance(grow.interface, MergeMethodInterface)
    assert [candidate[0].identifier for candidate in grow.interface.candidates] == ["grow_one", "grow_two"]
    assert grow_one.interface is None
    assert grow.get_param_names().args == ["a", "by"]


def test_the_merge_space_of_an_interface_holds_as_well() -> None:
    with pytest.raises(MergeSpaceError):
        run(sd_mecha.add_difference(model(a=1.0, b=1.0), grow(model(a=1.0, b=1.0))))


def test_a_recipe_with_an_interface_survives_text() -> None:
    from tests.extensions.support import removed_afterwards

    with removed_afterwards("face_of_test"):

        @merge_method(is_interface=True, identifier="face_of_test")
        def face(a: Parameter(Tensor)) -> Return(Tensor): ...

        recipe = face(sd_mecha.model("a.safetensors"))
        text = sd_mecha.serialize(recipe, finalize=False)
        assert 'merge "face_of_test" &0' in text
        assert sd_mecha.deserialize(text) == recipe


# --- declaring --------------------------------------------------------------------------------------------------------


def test_an_interface_has_no_keyword_only_parameters() -> None:
    with pytest.raises(RecipeTypeError, match="keyword-only parameters are not allowed in an interface"):

        @merge_method(register=False, is_interface=True)
        def wrong(a: Parameter(Tensor), *, b: Parameter(float) = 1.0) -> Return(Tensor): ...


def test_only_interfaces_are_implemented() -> None:
    with pytest.raises(RecipeTypeError, match="wrong implements grow_one, which is not an interface"):

        @merge_method(register=False, implements=grow_one)
        def wrong(a: Parameter(Tensor, model_config=ONE)) -> Return(Tensor, model_config=ONE):
            return a


def test_an_implementation_takes_the_same_parameters() -> None:
    with pytest.raises(RecipeTypeError, match=r"wrong takes \['b', 'by'\], its interface grow takes \['a', 'by'\]"):

        @merge_method(register=False, implements=grow)
        def wrong(b: Parameter(Tensor, model_config=ONE), by: Parameter(float) = 1.0) -> Return(
            Tensor, model_config=ONE
        ):
            return b
