"""What a parameter receives: the value for the key, as the declared type, in a real merge."""

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.errors import ContractError, RecipeTypeError
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, T, merge_method
from tests.extensions.support import config, model, numbers, registered, run

U = TypeVar("U")


def received(hint: Any, value: Any, **options: Any) -> Any:
    """What a parameter of that type gets for a value, in a merge of one key."""
    seen = []

    @merge_method(register=False)
    def probe(a: Tensor, b: hint, **kwargs: Any) -> Tensor:
        if a.device.type != "meta":
            seen.append(b)
        return a

    run(probe(model(x=[1.0, 2.0]), value), **options)
    (got,) = seen
    return got


PARAM = {"_space": "param"}


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 1, 1.0),
        (float, True, 1.0),
        (int, 2.7, 2),
        (int, True, 1),
        (bool, 1, True),
        (bool, 0.0, False),
        (str, "text", "text"),
        (float, torch.tensor(1.5), 1.5),
        (int, torch.tensor(3), 3),
        (bool, torch.tensor(1.0), True),
        (float, torch.tensor([2.5]), 2.5),
        (float, model(**PARAM, x=0.25), 0.25),
        (int, model(**PARAM, x=4.0), 4),
        (bool, model(**PARAM, x=[1.0]), True),
        (float, {"x": 3}, 3.0),
    ],
)
def test_values_arrive_as_the_declared_type(hint: type, value: Any, expected: Any) -> None:
    got = received(Parameter(hint | None), value)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3), torch.tensor(3.0), {"x": 3}, model(**PARAM, x=3.0)])
def test_a_number_becomes_a_tensor_without_dimensions(value: Any) -> None:
    got = received(Parameter(Tensor, "param"), value)
    assert isinstance(got, Tensor)
    assert got.shape == ()
    assert got == 3


def test_a_number_takes_the_dtype_of_the_merge() -> None:
    assert received(Parameter(Tensor, "param"), 3).dtype == torch.float32
    assert received(Parameter(Tensor, "param"), 3, merge_dtype="bf16").dtype == torch.bfloat16
    assert received(Parameter(Tensor, "param"), 3, merge_dtype="float64").dtype == torch.float64


def test_tensors_arrive_in_the_dtype_of_the_merge() -> None:
    half = sd_mecha.model({"x": torch.tensor([1.0], dtype=torch.float16)}, merge_space="param")
    assert received(Parameter(Tensor, "param"), half).dtype == torch.float32
    assert received(Parameter(Tensor, "param"), half, merge_dtype=None).dtype == torch.float16


@pytest.mark.parametrize(("value", "shape"), [([1.0, 2.0], r"\(2,\)"), ([], r"\(0,\)")])
def test_a_tensor_of_several_elements_is_no_number(value: list[float], shape: str) -> None:
    complaint = f"key 'x': probe: b: a tensor of shape {shape} cannot be used as float"
    with pytest.raises(RecipeTypeError, match=complaint):
        received(Parameter(float), model(**PARAM, x=value))


def test_a_tensor_is_no_text() -> None:
    with pytest.raises(RecipeTypeError, match=r"probe: b: a tensor .* cannot be used as str"):
        received(Parameter(str), model(**PARAM, x=1.0))
    with pytest.raises(RecipeTypeError, match="probe: b: a computed float cannot be used as str"):
        received(Parameter(str), total(model(x=1.0)))


def test_computed_text_is_no_number() -> None:
    with pytest.raises(RecipeTypeError, match=r"probe: b: .*str.*cannot be used as float"):
        received(Parameter(float), sd_mecha.get_dtype(model(x=1.0)))


@pytest.mark.parametrize(
    ("hint", "value", "complaint"),
    [
        (float, "0.5", "the str '0.5' cannot be cast to float"),
        (int, "x", "the str 'x' cannot be cast to int"),
        (
            Tensor,
            "a.safetensors",
            r"the str .* cannot be cast to Tensor; for a model file write sd_mecha.model\(path\)",
        ),
        (str, 3, "a int cannot be cast to str"),
        (float, [1.0], "a list cannot stand in a recipe"),
        (float, {"x": "text"}, "the str 'text' cannot be cast to float"),
    ],
)
def test_values_that_cannot_be_cast_are_refused_when_the_recipe_is_built(hint: Any, value: Any, complaint: str) -> None:
    with pytest.raises(RecipeTypeError, match=f"probe: b: {complaint}"):
        received(Parameter(hint), value)


# --- values that methods compute --------------------------------------------------------------------------------------


@merge_method(register=False)
def total(a: Parameter(Tensor, "weight")) -> Return(float, "param"):
    return float(a.sum()) if a.device.type != "meta" else 0.0


@merge_method(register=False)
def count(a: Parameter(Tensor, "weight")) -> Return(int, "param"):
    return a.numel()


@merge_method(register=False)
def mean(a: Parameter(Tensor, "weight")) -> Return(Tensor, "param"):
    return a.mean()


@pytest.mark.parametrize(
    ("hint", "source", "expected"),
    [
        (float, total, 5.0),
        (int, total, 5),
        (bool, total, True),
        (float, count, 2.0),
        (int, count, 2),
        (float, mean, 2.5),
        (int, mean, 2),
    ],
)
def test_computed_numbers_arrive_as_the_declared_type(hint: type, source: Any, expected: Any) -> None:
    got = received(Parameter(hint), source(model(x=[2.0, 3.0])))
    assert got == expected
    assert type(got) is hint


@pytest.mark.parametrize(("source", "expected"), [(total, 5.0), (count, 2.0), (mean, 2.5)])
def test_computed_numbers_become_tensors(source: Any, expected: float) -> None:
    got = received(Parameter(Tensor, "param"), source(model(x=[2.0, 3.0])))
    assert isinstance(got, Tensor)
    assert (got.shape, got.item()) == ((), expected)
    assert got.dtype == torch.float32


def test_a_computed_number_steers_an_elementwise_method() -> None:
    recipe = sd_mecha.weighted_sum(model(x=[0.0, 4.0]), model(x=[8.0, 8.0]), alpha=mean(model(x=[0.0, 0.5])))
    assert numbers(recipe) == {"x": [2.0, 5.0]}
    assert numbers(sd_mecha.weighted_sum(model(x=[0.0]), model(x=[8.0]), alpha=total(model(x=[0.25])))) == {"x": [2.0]}


def test_a_number_can_be_the_result() -> None:
    got = run(total(model(x=[2.0, 3.0])))
    assert got["x"].shape == ()
    assert got["x"] == 5


# --- dicts, one value per key -----------------------------------------------------------------------------------------


def test_a_dict_steers_key_by_key() -> None:
    a, b = model(x=0.0, y=0.0), model(x=8.0, y=8.0)
    assert numbers(sd_mecha.weighted_sum(a, b, alpha={"x": 0.25, "y": 1})) == {"x": 2.0, "y": 8.0}


def test_keys_that_a_dict_lacks_are_not_made() -> None:
    a, b = model(x=0.0, y=0.0), model(x=8.0, y=8.0)
    assert numbers(sd_mecha.weighted_sum(a, b, alpha={"x": 0.25})) == {"x": 2.0}


def test_a_number_fills_the_gaps_of_a_dict_where_the_config_is_known() -> None:
    with registered(config("tiny-test", "x", "y")):
        a, b = model("tiny-test", x=0.0, y=0.0), model("tiny-test", x=8.0, y=8.0)
        alpha = sd_mecha.literal({"x": 0.25}) | 1.0
        assert numbers(sd_mecha.weighted_sum(a, b, alpha=alpha)) == {"x": 2.0, "y": 8.0}


def test_a_param_model_steers_key_by_key() -> None:
    alpha = model(**PARAM, x=0.25, y=0.5)
    assert numbers(sd_mecha.weighted_sum(model(x=0.0, y=0.0), model(x=8.0, y=8.0), alpha)) == {"x": 2.0, "y": 4.0}


def test_a_param_model_of_one_value_per_element() -> None:
    alpha = model(**PARAM, x=[0.0, 0.5, 1.0])
    assert numbers(sd_mecha.weighted_sum(model(x=[1.0] * 3), model(x=[3.0] * 3), alpha)) == {"x": [1.0, 2.0, 3.0]}


# --- state dicts ------------------------------------------------------------------------------------------------------


@merge_method(register=False)
def look(a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
    key = kwargs["key"]
    assert key in a
    assert list(a.keys()) == [key]
    assert len(a) == 1
    assert a.model_config.identifier == "structural"
    return a[key] + 1


def test_a_state_dict_offers_the_key_at_hand() -> None:
    assert numbers(look(model(x=1.0, y=2.0))) == {"x": 2.0, "y": 3.0}


def test_a_state_dict_knows_the_config_of_its_model() -> None:
    seen = set()

    @merge_method(register=False)
    def configs(a: StateDict[Tensor], **kwargs: Any) -> Tensor:
        seen.add(a.model_config.identifier)
        seen.add(len(a.model_config.keys()))
        return a[kwargs["key"]]

    run(configs(model(x=1.0, y=2.0)))
    assert seen == {"structural", 2}


@pytest.mark.parametrize("validate", [True, False])
def test_reading_another_key_is_a_named_error(validate: bool) -> None:
    @merge_method(register=False)
    def nosy(a: StateDict[Tensor], **kwargs: Any) -> Tensor:
        return a["x"]

    with pytest.raises(ContractError, match="nosy reads key 'x', which its key map does not name") as error:
        run(nosy(model(y=1.0, x=2.0)), validate_mm_contract=validate)
    assert isinstance(error.value, AssertionError)


def test_a_state_dict_is_read_lazily() -> None:
    @merge_method(register=False, tiling="elementwise")
    def first_only(a: Parameter(StateDict[Tensor]), b: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
        return a[kwargs["key"]] * 1

    # a tensor with NaN counts as missing once it is read; the method never reads this one
    unread = model(x=[float("nan"), 2.0])
    assert numbers(first_only(model(x=[1.0, 2.0]), unread)) == {"x": [1.0, 2.0]}
    assert numbers(first_only(unread, model(x=[1.0, 2.0])), allow_empty_merge=True) == {}


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (StateDict[float], 3, 3.0),
        (StateDict[float], {"x": 3}, 3.0),
        (StateDict[float], model(**PARAM, x=2.0), 2.0),
        (StateDict[int], total(model(x=[2.0, 3.0])), 5),
        (StateDict[str], "s", "s"),
        (StateDict[bool], 1, True),
    ],
)
def test_values_of_a_state_dict_have_its_type(hint: Any, value: Any, expected: Any) -> None:
    got = received(Parameter(hint, "param"), value)["x"]
    assert got == expected
    assert type(got) is type(expected)


def test_a_state_dict_of_tensors_takes_numbers() -> None:
    assert received(Parameter(StateDict[Tensor], "param"), 3)["x"].shape == ()


# --- type variables ---------------------------------------------------------------------------------------------------


@merge_method(register=False)
def same(a: Parameter(T), b: Parameter(U) = None) -> Return(T):
    return a


def test_a_type_variable_takes_tensors_and_values_as_they_are() -> None:
    assert numbers(same(model(x=[1.0, 2.0]))) == {"x": [1.0, 2.0]}
    for value in (1, 1.5, "text", True):
        got = received(Parameter(U, "param"), value)
        assert (type(got), got) == (type(value), value)
    assert received(Parameter(float), same(2)) == 2.0


# --- any number of inputs ---------------------------------------------------------------------------------------------


@merge_method(register=False)
def weigh(base: Parameter(Tensor), *models: Parameter(Tensor), by: Parameter(float) = 1.0) -> Return(Tensor):
    return base + by * sum(models)


@merge_method(register=False)
def weigh_lazily(*models: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
    return sum(m[kwargs["key"]] for m in models)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_varargs_take_any_number_of_inputs(n: int) -> None:
    models = [model(x=[float(i)]) for i in range(n)]
    assert numbers(weigh(model(x=[100.0]), *models, by=2.0)) == {"x": [100.0 + 2 * sum(range(n))]}
    if n:
        assert numbers(weigh_lazily(*models)) == {"x": [float(sum(range(n)))]}


def test_varargs_take_numbers_too() -> None:
    @merge_method(register=False)
    def scaled(a: Parameter(Tensor), *factors: Parameter(float)) -> Return(Tensor):
        for factor in factors:
            a = a * factor
        return a

    assert numbers(scaled(model(x=[1.0]), 2, 3.0, model(**PARAM, x=0.5))) == {"x": [3.0]}
