"""Declaring a merge method: what is read from the annotations, and what is refused."""

import inspect
import itertools
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.errors import DuplicateNameError, RecipeTypeError, UnknownNameError
from sd_mecha.extensions import merge_methods, merge_spaces
from sd_mecha.extensions.merge_methods import MergeMethod, Parameter, Return, StateDict, merge_method
from tests.extensions.support import model, removed_afterwards, run

U = TypeVar("U")


def declare(fn: Any, **options: Any) -> MergeMethod:
    return merge_method(register=False, **options)(fn)


def test_the_decorator_works_bare_and_with_arguments() -> None:
    with removed_afterwards("bare_method", "named_method"):

        @merge_method
        def bare_method(a: Parameter(Tensor)) -> Return(Tensor):
            """Doc."""
            return a

        @merge_method(identifier="named_method")
        def some_function(a: Parameter(Tensor)) -> Return(Tensor):
            return a

        assert merge_methods.resolve("bare_method") is bare_method
        assert merge_methods.resolve("named_method") is some_function
        assert bare_method in merge_methods.get_all()
        assert (bare_method.__doc__, bare_method.__name__) == ("Doc.", "bare_method")


def test_a_method_can_stay_unregistered() -> None:
    def quiet_method(a: Parameter(Tensor)) -> Return(Tensor):
        return a * 2

    method = declare(quiet_method)
    with pytest.raises(UnknownNameError):
        merge_methods.resolve("quiet_method")
    assert run(method(model(x=3.0)))["x"] == 6


def test_the_wrapped_function_is_the_plain_one() -> None:
    def double(a: Parameter(Tensor)) -> Return(Tensor):
        return a * 2

    assert declare(double).__wrapped__ is double


def test_what_a_method_says_of_itself() -> None:
    def method(
        a: Parameter(StateDict[Tensor], "weight"),
        b: Parameter(Tensor, {"weight", "delta"}, "sd1-ldm"),
        *rest: Parameter(Tensor),
        alpha: Parameter(float) = 0.5,
        beta: Parameter(int),
        **kwargs: Any,
    ) -> Return(Tensor, "delta"):
        return b

    made = declare(method, identifier="declared")
    names = made.get_param_names()
    assert (made.identifier, made.get_identifier()) == ("declared", "declared")
    assert (names.args, names.vararg, names.kwargs) == (["a", "b"], "rest", {"alpha": "alpha", "beta": "beta"})
    assert names.has_varargs()
    assert names.args_varargs(4) == ["a", "b", "rest", "rest"]
    assert names.as_dict(2) == {0: "a", 1: "b", "alpha": "alpha", "beta": "beta"}
    types = made.get_input_types()
    assert (types.args, types.vararg, types.kwargs) == (
        [StateDict[Tensor], Tensor], Tensor, {"alpha": float, "beta": int},
    )  # fmt: skip
    spaces = made.get_input_merge_spaces()
    assert [merge_spaces.get_identifiers(s) for s in spaces.args] == [["weight"], ["weight", "delta"]]
    assert merge_spaces.get_identifiers(spaces.vararg)[:3] == ["weight", "delta", "param"]
    assert merge_spaces.get_identifiers(spaces.kwargs["alpha"]) == ["param"]
    configs = made.get_input_configs()
    assert [None if c is None else c.identifier for c in configs.args] == [None, "sd1-ldm"]
    assert made.get_default_args().kwargs == {"alpha": 0.5}
    assert made.get_default_args().args == []
    assert made.get_return_type() is Tensor
    assert merge_spaces.get_identifiers(made.get_return_merge_space()) == ["delta"]
    assert list(made.get_signature().parameters) == ["a", "b", "rest", "alpha", "beta"]


def test_a_method_without_varargs_says_so() -> None:
    def method(a: Parameter(Tensor)) -> Return(Tensor):
        return a

    names = declare(method).get_param_names()
    assert not names.has_varargs()
    assert names.as_dict(0) == {0: "a"}


def test_the_return_space_follows_an_argument_that_shares_its_symbol() -> None:
    def method(a: Parameter(Tensor), alpha: Parameter(float) = 1.0) -> Return(Tensor):
        return a

    assert declare(method).get_return_merge_space(["delta"], {}) == "delta"


def test_bare_type_hints_stand_for_parameters() -> None:
    def method(a: Tensor, b: StateDict[Tensor], alpha: float = 2.0, note: str = "x", **kwargs: Any) -> Tensor:
        return a * alpha + b[kwargs["key"]]

    made = declare(method)
    assert made.get_input_types().args == [Tensor, StateDict[Tensor], float, str]
    assert run(made(model(x=3.0), model(x=1.0)))["x"] == 7


@pytest.mark.parametrize("hint", [Tensor | None, Parameter(Tensor | None), Parameter(None | Tensor)])
def test_optional_types_are_taken_as_the_type(hint: Any) -> None:
    def method(a: Tensor, b: hint = None) -> Tensor:
        return a if b is None else a * b

    made = declare(method)
    assert made.get_input_types().args[1] is Tensor
    assert run(made(model(x=3.0)))["x"] == 3
    assert run(made(model(x=3.0), 2))["x"] == 6


def test_an_optional_state_dict_holds_none_for_every_key() -> None:
    def method(a: Tensor, b: StateDict[Tensor] | None = None, **kwargs: Any) -> Tensor:
        b = b[kwargs["key"]]
        return a if b is None else a * b

    made = declare(method)
    assert made.get_input_types().args[1] == StateDict[Tensor]
    assert run(made(model(x=3.0)))["x"] == 3
    assert run(made(model(x=3.0), model(_space="param", x=2.0)))["x"] == 6


def test_annotations_may_be_text() -> None:
    def method(a: "Parameter(Tensor)", alpha: "float" = 3.0) -> "Return(Tensor)":
        return a * alpha

    assert run(declare(method)(model(x=2.0)))["x"] == 6


def test_an_annotation_that_names_nothing_is_explained() -> None:
    def method(a: "Parameter(Tensor, NoSuchName)") -> Return(Tensor):  # noqa: F821
        return a

    with pytest.raises(RecipeTypeError, match="annotation name 'NoSuchName' cannot be found"):
        declare(method)


@pytest.mark.parametrize("name", ["key", "key_relation", "cache", "output_reused", "tile"])
def test_reserved_names_are_refused(name: str) -> None:
    scope: dict[str, Any] = {"Tensor": Tensor}
    exec(f"def method(a: Tensor, {name}: Tensor) -> Tensor: return a", scope)
    with pytest.raises(RecipeTypeError, match=f"parameter {name}: the name is reserved"):
        declare(scope["method"])


@pytest.mark.parametrize("hint", [list, dict[str, Tensor], Tensor | int, StateDict[list], bytes])
def test_types_that_recipes_do_not_hold_are_refused(hint: Any) -> None:
    def method(a: Tensor, b: hint) -> Tensor:
        return a

    with pytest.raises(RecipeTypeError, match=r"method: parameter b: .* is not a type a merge method can take"):
        declare(method, identifier="a method")


def test_missing_annotations_are_refused() -> None:
    def parameter(a) -> Tensor:
        return a

    def result(a: Tensor):
        return a

    with pytest.raises(RecipeTypeError, match="parameter a has no type annotation"):
        declare(parameter)
    with pytest.raises(RecipeTypeError, match="the result has no type annotation"):
        declare(result)


def test_wrong_names_of_spaces_and_configs_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'weight'"):
        Parameter(Tensor, "wieght")
    with pytest.raises(UnknownNameError, match="did you mean 'sd1-ldm'"):
        Parameter(Tensor, model_config="sd1-lmd")


def test_unknown_tiling_is_refused() -> None:
    with pytest.raises(RecipeTypeError, match="tiling='tiles'"):
        declare(lambda a: a, tiling="tiles", identifier="x")


def test_a_generator_must_be_elementwise() -> None:
    def method(a: Tensor) -> Tensor:
        yield

    with pytest.raises(RecipeTypeError, match='declare tiling="elementwise"'):
        declare(method)


def test_an_identifier_is_taken_once() -> None:
    with removed_afterwards("taken_name"):

        @merge_method(identifier="taken_name")
        def first(a: Tensor) -> Tensor:
            return a

        with pytest.raises(DuplicateNameError, match="merge method 'taken_name' is already registered"):

            @merge_method(identifier="taken_name")
            def second(a: Tensor) -> Tensor:
                return a

        assert merge_methods.resolve("taken_name") is first


def test_an_unknown_method_is_suggested_only_where_one_is_near() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'weighted_sum'") as near:
        merge_methods.resolve("weigthed_sum")
    assert isinstance(near.value, KeyError)
    with pytest.raises(UnknownNameError) as far:
        merge_methods.resolve("qqqqqqqqqqqq")
    assert "did you mean" not in str(far.value)


# --- calling ---------------------------------------------------------------------------------------------------------


def plain(a: Tensor, b: Tensor, alpha: Parameter(float) = 0.5, *, beta: Parameter(float) = 0.0) -> Tensor:
    return a + alpha * b + beta


def test_calling_binds_like_python() -> None:
    made = declare(plain)
    a, b = model(x=1.0), model(x=2.0)
    node = made(b=b, a=a, beta=4)
    assert node == made(a, b, 0.5, beta=4)
    assert [str(type(n).__name__) for n in node.args] == ["ModelRecipeNode", "ModelRecipeNode", "MergeRecipeNode"]
    assert run(node)["x"] == 6


@pytest.mark.parametrize(
    ("args", "kwargs", "complaint"),
    [
        (1, {}, "missing a required argument: 'b'"),
        (4, {}, "too many positional arguments"),
        (2, {"gamma": 1.0}, "got an unexpected keyword argument 'gamma'"),
        (2, {"a": 1.0}, "multiple values for argument 'a'"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(args: int, kwargs: Any, complaint: str) -> None:
    with pytest.raises(RecipeTypeError, match=complaint) as error:
        declare(plain)(*[model(x=1.0)] * args, **kwargs)
    assert str(error.value).startswith("plain(a, b, alpha=..., *, beta=...)")


def test_none_for_a_required_argument_is_explained() -> None:
    with pytest.raises(RecipeTypeError, match="plain: b is None"):
        declare(plain)(model(x=1.0), None)


def test_create_recipe_takes_bound_arguments() -> None:
    made = declare(plain)
    bound = made.get_signature().bind(model(x=1.0), model(x=2.0), beta=1.0)
    assert isinstance(bound, inspect.BoundArguments)
    assert run(made.create_recipe(bound))["x"] == 3


def test_a_method_that_raises_keeps_its_exception_and_says_where() -> None:
    def failing(a: Tensor) -> Tensor:
        if a.device.type != "meta":
            raise ZeroDivisionError("mine")
        return a

    with pytest.raises(ZeroDivisionError, match="mine") as error:
        run(declare(failing)(model(x=1.0)))
    notes = getattr(error.value, "__notes__", ["merge method failing failed at key 'x'"])
    assert "merge method failing failed at key 'x'" in notes


def test_methods_with_one_identifier_are_different_methods() -> None:
    first = declare(plain, identifier="same")

    def other(a: Tensor, b: Tensor) -> Tensor:
        return a - b

    second = declare(other, identifier="same")
    a, b = model(x=5.0), model(x=2.0)
    assert first(a, b) != second(a, b)
    assert run(sd_mecha.n_average(first(a, b), second(a, b)))["x"] == torch.tensor((6.0 + 3.0) / 2)


def test_default_factories_make_a_value_for_each_node() -> None:
    numbers = itertools.count(5)

    @merge_method(register=False, default_factories={"seed": lambda: next(numbers)})
    def noisy(a: Parameter(Tensor), seed: Parameter(int) = None, *, flag: Parameter(bool) = False) -> Return(Tensor):
        return a + seed

    model = sd_mecha.model({"w": torch.tensor([0.0])})

    def value(node: Any) -> float:
        return float(sd_mecha.merge(node, output_dtype=None)["w"])

    left_out, given_none, given = noisy(model), noisy(model, None, flag=True), noisy(model, seed=1)
    assert [value(left_out), value(left_out), value(given_none), value(given)] == [5.0, 5.0, 6.0, 1.0]
    assert left_out != noisy(model)
    assert noisy.get_default_args().as_dict() == {0: None, "flag": False}


@pytest.mark.parametrize("name", ["b", "rank"])
def test_default_factories_need_a_parameter_of_default_none(name: str) -> None:
    with pytest.raises(RecipeTypeError, match=f"default_factories names '{name}'"):

        @merge_method(register=False, default_factories={name: lambda: 1})
        def broken(a: Parameter(Tensor), rank: Parameter(int) = 3) -> Return(Tensor):
            return a
