"""`map_keys` through real merges: which keys are made, from what, and what the method is told about it."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.errors import ContractError
from sd_mecha.extensions.key_map import ComposeObject, KeyMapError
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method, skip_key
from tests.extensions.support import config, model, numbers, registered, run

SOURCE = config("source-test", "a", "b", "c")
TARGET = config("target-test", "x", "y", "z")


@pytest.fixture(autouse=True)
def _configs() -> Iterator[None]:
    with registered(SOURCE, TARGET):
        yield


def mapped(rule: Any, call: Any = None, result: Any = TARGET, **options: Any) -> Any:
    """A method from the source config to another, with that key map; by default it adds up what it is given."""

    def add_up(self: Any, m: Parameter(StateDict[Tensor], model_config=SOURCE), **kwargs: Any) -> Return(
        Tensor, model_config=result
    ):
        relation = kwargs["key_relation"]
        total = sum((m[key] for key in relation.inputs.get("m", ())), torch.zeros(()))
        outputs = relation.outputs
        return total if len(outputs) == 1 else {key: total + i for i, key in enumerate(outputs)}

    body = {"map_keys": staticmethod(rule), "__call__": call or add_up}
    return merge_method(register=False, identifier="mapped", **options)(type("mapped", (), body))


def test_keys_are_renamed() -> None:
    def rule(builder: Any) -> None:
        builder["x"] = builder.m.keys["a"]
        builder["y"] = builder.keys["b"]

    assert numbers(mapped(rule)(model(a=1.0, b=2.0, c=3.0))) == {"x": 1.0, "y": 2.0}


def test_and_needs_both() -> None:
    def rule(builder: Any) -> None:
        builder["x"] = builder.m.keys["a"] & builder.m.keys["b"]
        builder["y"] = builder.m.keys["a", "c"]

    assert numbers(mapped(rule)(model(a=1.0, b=2.0, c=4.0))) == {"x": 3.0, "y": 5.0}
    assert numbers(mapped(rule)(model("source-test", a=1.0, b=2.0))) == {"x": 3.0}
    assert numbers(mapped(rule)(model("source-test", c=1.0, b=2.0)), allow_empty_merge=True) == {}


def test_or_takes_the_first_that_can_be_had() -> None:
    def rule(builder: Any) -> None:
        builder["x"] = builder.m.keys["a"] | builder.m.keys["b"] | builder.m.keys["c"]
        alternatives = None
        for key in ("c", "b"):
            alternatives |= builder.m.keys[key]
        builder["y"] = alternatives

    method = mapped(rule)
    assert numbers(method(model(a=1.0, b=2.0, c=3.0))) == {"x": 1.0, "y": 3.0}
    assert numbers(method(model("source-test", a=1.0, b=2.0))) == {"x": 1.0, "y": 2.0}
    assert numbers(method(model("source-test", c=3.0))) == {"x": 3.0, "y": 3.0}


def test_and_distributes_over_or() -> None:
    def rule(builder: Any) -> None:
        keys = builder.m.keys
        builder["x"] = keys["a"] & (keys["b"] | keys["c"])

    assert numbers(mapped(rule)(model("source-test", a=1.0, c=4.0))) == {"x": 5.0}
    assert numbers(mapped(rule)(model("source-test", a=1.0, b=2.0, c=4.0))) == {"x": 3.0}


def test_an_alternative_is_taken_where_an_input_turns_out_to_be_missing() -> None:
    def rule(builder: Any) -> None:
        builder["x"] = builder.m.keys["a"] | builder.m.keys["b"]

    assert numbers(mapped(rule)(model(a=float("nan"), b=2.0, c=3.0))) == {"x": 2.0}


def test_meta_travels_with_the_alternative_that_is_taken() -> None:
    seen = []

    def rule(builder: Any) -> None:
        keys = builder.m.keys
        builder["x"] = keys["a"] @ {"way": "a"} | keys["b"] @ {"way": "b"}
        builder["y"] = (keys["a"] @ {"first": 1}) & (keys["b"] @ {"second": 2})
        builder["z"] = keys["c"]

    def call(self: Any, m: Parameter(StateDict[Tensor], model_config=SOURCE), **kwargs: Any) -> Return(
        Tensor, model_config=TARGET
    ):
        relation = kwargs["key_relation"]
        (key, *_) = relation.inputs["m"]
        seen.append((kwargs["key"], relation.meta))
        return m[key]

    method = mapped(rule, call)
    run(method(model(a=1.0, b=2.0, c=3.0)))
    assert ("x", {"way": "a"}) in seen
    assert ("y", {"first": 1, "second": 2}) in seen
    assert ("z", None) in seen
    seen.clear()
    run(method(model("source-test", b=2.0)))
    assert ("x", {"way": "b"}) in seen
    assert {key for key, _ in seen} == {"x"}


class Halve(ComposeObject):
    factors: ClassVar[tuple[float, ...]] = (0.5,)

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:
        return x * 0.5


class Negate(ComposeObject):
    @classmethod
    def flip(cls, x: Tensor) -> Tensor:
        return -x


def test_meta_classes_compose() -> None:
    def rule(builder: Any) -> None:
        builder["x"] = (builder.m.keys["a"] @ Halve) & (builder.m.keys["b"] @ Negate)

    def call(self: Any, m: Parameter(StateDict[Tensor], model_config=SOURCE), **kwargs: Any) -> Return(
        Tensor, model_config=TARGET
    ):
        meta = kwargs["key_relation"].meta
        return meta.apply(m["a"]) + meta.flip(m["b"])

    assert numbers(mapped(rule, call)(model(a=4.0, b=3.0, c=0.0))) == {"x": -1.0}


def test_one_call_makes_several_keys() -> None:
    calls = []

    def rule(builder: Any) -> None:
        builder["x", "y"] = builder.m.keys["a", "b"]
        builder["z"] = builder.m.keys["c"]

    def call(self: Any, m: Parameter(StateDict[Tensor], model_config=SOURCE), **kwargs: Any) -> Return(
        StateDict[Tensor], model_config=TARGET
    ):
        outputs, inputs = kwargs["key_relation"]
        if m[inputs["m"][0]].device.type != "meta":
            calls.append(outputs)
        if len(outputs) == 1:
            return {"z": m["c"]}
        return {"x": torch.stack([m["a"], m["b"]]), "y": m["a"] - m["b"]}

    got = numbers(mapped(rule, call)(model(a=5.0, b=2.0, c=9.0)))
    assert got == {"x": [5.0, 2.0], "y": 3.0, "z": 9.0}
    assert sorted(calls) == [("x", "y"), ("z",)]


@pytest.mark.parametrize("threads", [0, 3])
def test_all_keys_at_once(threads: int) -> None:
    calls = []

    def rule(builder: Any) -> None:
        builder[...] = builder.keys[tuple(builder.keys())]

    def call(self: Any, m: Parameter(StateDict[Tensor], model_config=SOURCE), **kwargs: Any) -> Return(
        StateDict[Tensor], model_config=SOURCE
    ):
        if m["a"].device.type != "meta":
            calls.append(kwargs["key"])
        total = m["a"] + m["b"] + m["c"]
        return {key: m[key] / total for key in m}

    got = numbers(mapped(rule, call)(model(a=1.0, b=2.0, c=5.0)), threads=threads)
    assert got == {"a": 0.125, "b": 0.25, "c": 0.625}
    assert len(calls) == 1


def test_a_group_that_is_skipped_goes_as_a_whole() -> None:
    def rule(builder: Any) -> None:
        builder["x", "y"] = builder.m.keys["a"]
        builder["z"] = builder.m.keys["c"]

    def call(self: Any, m: Parameter(StateDict[Tensor], model_config=SOURCE), **kwargs: Any) -> Return(
        StateDict[Tensor], model_config=TARGET
    ):
        if kwargs["key"] == "x" and m["a"].device.type != "meta":
            skip_key("x")
        return dict.fromkeys(kwargs["key_relation"].outputs, next(iter(m.values())))

    recipe = mapped(rule, call)(model(a=1.0, b=2.0, c=3.0))
    assert numbers(recipe) == {"z": 3.0}
    assert numbers(recipe | model("target-test", x=7.0, y=8.0)) == {"x": 7.0, "y": 8.0, "z": 3.0}


def test_nothing_may_be_needed_at_all() -> None:
    def rule(builder: Any) -> None:
        builder["x"] = builder.keys[()]
        builder["y"] = builder.m.keys["a"] | builder.m.keys[()]

    method = mapped(rule)
    assert numbers(method(model("source-test", a=4.0))) == {"x": 0.0, "y": 4.0}
    assert numbers(method(model("source-test", b=4.0))) == {"x": 0.0, "y": 0.0}


def test_the_builder_lists_keys_with_their_metadata() -> None:
    listed = {}

    def rule(builder: Any) -> None:
        listed["m"] = list(builder.m.keys())
        listed["all"] = list(builder.keys())
        listed["out"] = list(builder.out.keys())
        listed["items"] = {key: metadata.optional for key, metadata in builder.m.keys.items()}
        builder["x"] = builder.m.keys["a"]

    run(mapped(rule)(model(a=1.0, b=1.0, c=1.0)))
    assert listed == {
        "m": ["a", "b", "c"],
        "all": ["a", "b", "c"],
        "out": ["x", "y", "z"],
        "items": {"a": False, "b": False, "c": False},
    }


def test_a_map_over_models_of_unknown_architecture() -> None:
    class neighbours:
        @staticmethod
        def map_keys(builder: Any) -> None:
            keys = list(builder.out.keys())
            for key, other in zip(keys, keys[1:] + keys[:1], strict=True):
                builder[key] = builder.a.keys[other]

        def __call__(self, a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
            (key,) = kwargs["key_relation"].inputs["a"]
            return a[key]

    method = merge_method(register=False)(neighbours)
    assert numbers(method(model(p=1.0, q=2.0, r=3.0))) == {"p": 2.0, "q": 3.0, "r": 1.0}


def test_other_parameters_keep_the_value_they_have() -> None:
    class scaled_swap:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["x"] = builder.a.keys["y"]
            builder["y"] = builder.a.keys["x"]

        def __call__(
            self,
            a: Parameter(StateDict[Tensor]),
            by: Parameter(float) = 2.0,
            *rest: Parameter(float),
            note: Parameter(str) = "none",
            **kwargs: Any,
        ) -> Return(Tensor):
            (key,) = kwargs["key_relation"].inputs["a"]
            return a[key] * by + len(note) + sum(rest)

    method = merge_method(register=False)(scaled_swap)
    a = model(x=1.0, y=5.0)
    assert numbers(method(a)) == {"x": 14.0, "y": 6.0}
    assert numbers(method(a, 3, 100.0, note="")) == {"x": 115.0, "y": 103.0}


def test_varargs_are_one_parameter_of_the_map() -> None:
    class crossed:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["x"] = builder.models.keys["x", "y"]

        def __call__(self, *models: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
            assert kwargs["key_relation"].inputs == {"models": ("x", "y")}
            return sum(m["x"] * m["y"] for m in models)

    method = merge_method(register=False)(crossed)
    assert numbers(method(model(x=2.0, y=3.0), model(x=5.0, y=7.0))) == {"x": 41.0}


def test_a_shared_group_is_computed_once() -> None:
    calls = []

    def rule(builder: Any) -> None:
        builder["x", "y", "z"] = builder.m.keys["a", "b", "c"]

    def call(self: Any, m: Parameter(StateDict[Tensor], model_config=SOURCE), **kwargs: Any) -> Return(
        StateDict[Tensor], model_config=TARGET
    ):
        if m["a"].device.type != "meta":
            calls.append(kwargs["key"])
        return {"x": m["a"], "y": m["b"], "z": m["c"]}

    node = mapped(rule, call)(model(a=1.0, b=2.0, c=3.0))
    assert numbers(sd_mecha.n_average(node, node)) == {"x": 1.0, "y": 2.0, "z": 3.0}
    assert len(calls) == 1


# --- what breaks the contract -----------------------------------------------------------------------------------------


def breaking(result: Any) -> Any:
    def rule(builder: Any) -> None:
        builder["x", "y"] = builder.m.keys["a"]

    def call(self: Any, m: Parameter(StateDict[Tensor], model_config=SOURCE), **kwargs: Any) -> Return(
        StateDict[Tensor], model_config=TARGET
    ):
        return result(m)

    return mapped(rule, call)(model(a=1.0, b=2.0, c=3.0))


def test_a_key_that_is_not_returned_is_a_named_error() -> None:
    with pytest.raises(ContractError, match="mapped did not return key 'y', which its key map declares"):
        run(breaking(lambda m: {"x": m["a"]}))


def test_a_key_too_many_is_a_named_error_where_contracts_are_checked() -> None:
    recipe = breaking(lambda m: {"x": m["a"], "y": m["a"], "z": m["a"]})
    with pytest.raises(ContractError, match="mapped returned key 'z', which its key map does not declare") as error:
        run(recipe)
    assert isinstance(error.value, AssertionError)
    assert numbers(recipe, validate_mm_contract=False) == {"x": 1.0, "y": 1.0}


def test_reading_outside_the_relation_is_a_named_error() -> None:
    with pytest.raises(ContractError, match=r"mapped reads key 'b', which its key map does not name.*it names 'a'"):
        run(breaking(lambda m: {"x": m["a"], "y": m["b"]}))


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (lambda b: b.__setitem__("x", b.mm.keys["a"]), r"no parameter 'mm'.*did you mean 'm'|parameters: 'm'"),
        (lambda b: b.__setitem__("x", b.m.keys["q"]), "unknown input .*key 'q'"),
        (lambda b: b.__setitem__("q", b.m.keys["a"]), "unknown output key 'q'"),
        (lambda b: [b.__setitem__("x", b.m.keys["a"]) for _ in range(2)], "'x' is made twice"),
        (lambda b: b.__setitem__((), b.m.keys["a"]), "at least one key"),
    ],
)
def test_contradictions_of_a_map_are_found_while_planning(rule: Any, complaint: str) -> None:
    with pytest.raises(KeyMapError, match=complaint):
        sd_mecha.plan(mapped(rule)(model(a=1.0, b=2.0, c=3.0)), strict_merge_space=None)


def test_a_map_over_inputs_of_two_configs_must_name_the_parameter() -> None:
    class joined:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["x"] = builder.keys["a"]

        def __call__(
            self,
            m: Parameter(StateDict[Tensor], model_config=SOURCE),
            n: Parameter(StateDict[Tensor], model_config=TARGET),
            **kwargs: Any,
        ) -> Return(Tensor, model_config=TARGET):
            return m["a"]

    with pytest.raises(KeyMapError, match="needs inputs of one config, got m: source-test, n: target-test"):
        run(merge_method(register=False)(joined)(model(a=1.0), model(x=1.0)))
