"""Calls that make several keys at once, and key maps while merging."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.errors import ContractError
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict
from tests.execution.support import Calls, make, merged, tensor


def exchange_method(calls: Calls, **options: Any) -> Any:
    class exchange:
        """Makes two keys from both keys of both inputs; the third key alone."""

        def __init__(self) -> None:
            calls.add(planning=True, made=True)

        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["p", "q"] = (builder.a.keys["p", "q"] & builder.b.keys["p", "q"]) @ {"note": 1}
            builder["r"] = builder.a.keys["r"]

        def __call__(self, a: Parameter(StateDict[Tensor]), b: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(
            StateDict[Tensor]
        ):
            relation = kwargs["key_relation"]
            calls.add(
                planning=a[next(iter(a))].is_meta,
                outputs=relation.outputs,
                inputs={k: v for k, v in relation.inputs.items() if v},
                meta=relation.meta,
                reused=kwargs["output_reused"],
                instance=id(self),
                cache=kwargs["cache"],
            )
            if relation.outputs == ("r",):
                return {"r": a["r"] * 3}
            return {"p": a["q"] + b["p"], "q": a["p"] - b["q"]}

    return make(**options)(exchange)


@pytest.mark.parametrize("memoize", [True, False])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_group_of_keys_is_computed_once(memoize: bool, threads: int) -> None:
    calls = Calls()
    exchange = exchange_method(calls)
    a, b = ({k: tensor((100, 90), seed=s + i) for i, k in enumerate("pqr")} for s in (0, 10))
    node = exchange(sd_mecha.model(a), sd_mecha.model(b))
    cache: dict[str, Any] = {}
    recipe = sd_mecha.weighted_sum(node, sd_mecha.model(a), alpha=0.25)
    got = merged(recipe, memoize_intermediates=memoize, threads=threads, cache={node: cache})
    for key, value in (("p", a["q"] + b["p"]), ("q", a["p"] - b["q"]), ("r", a["r"] * 3)):
        assert torch.allclose(got[key], torch.lerp(value, a[key], 0.25)), key
    real = calls.real()
    assert Counter(c["outputs"] for c in real) == {("p", "q"): 1, ("r",): 1}
    group, single = sorted(real, key=lambda c: c["outputs"])
    assert group["inputs"] == {"a": ("p", "q"), "b": ("p", "q")}
    assert single["inputs"] == {"a": ("r",)}
    assert group["meta"] == {"note": 1}
    assert len({c["instance"] for c in real}) == 1
    assert all(c["cache"] is cache for c in real)


def test_results_of_a_group_are_written_as_they_are() -> None:
    calls = Calls()
    a, b = ({k: tensor((3, i + 2), seed=i) for i, k in enumerate("pqr")} for _ in range(2))
    for m in (a, b):
        m["q"] = m["p"].clone()
    got = merged(exchange_method(calls)(sd_mecha.model(a), sd_mecha.model(b)))
    assert torch.equal(got["p"], a["q"] + b["p"])
    assert got.keys() == {"p", "q", "r"}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"p": 1}, "did not return key 'q'"),
        ({"p": 1, "q": 1, "x": 1}, "returned key 'x'"),
    ],
)
def test_a_group_that_does_not_return_what_it_declares(returned: dict[str, int], message: str) -> None:
    class wrong:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["p", "q"] = builder.keys["p"] & builder.keys["q"]

        def __call__(self, a: Parameter(StateDict[Tensor])) -> Return(StateDict[Tensor]):
            return dict.fromkeys(returned, a["p"])

    with pytest.raises(ContractError, match=message) as caught:
        merged(make(identifier="wrong")(wrong)(sd_mecha.model({"p": tensor((2,)), "q": tensor((2,))})))
    assert "wrong" in str(caught.value)


def test_reading_a_key_that_the_map_does_not_name() -> None:
    class nosy:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["p"] = builder.keys["p"]

        def __call__(self, a: Parameter(StateDict[Tensor])) -> Return(Tensor):
            return a["p"] if a["p"].is_meta else a["q"]

    with pytest.raises(ContractError, match="reads key 'q'"):
        merged(make()(nosy)(sd_mecha.model({"p": tensor((2,)), "q": tensor((2,))})))


def test_alternatives_choose_by_parameter() -> None:
    """Two keys whose inputs look alike, but come from different parameters."""

    class either:
        @staticmethod
        def map_keys(builder: Any) -> None:
            for key in builder.out.keys():  # noqa: SIM118
                builder[key] = builder.a.keys[key] | builder.b.keys[key]

        def __call__(self, a: Parameter(StateDict[Tensor]), b: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(
            Tensor
        ):
            inputs = kwargs["key_relation"].inputs
            key = kwargs["key"]
            return a[key] * 1 if inputs.get("a") else b[key] * 2

    method = make()(either)
    keys = ["first_stage_model.quant_conv.bias", "first_stage_model.post_quant_conv.bias"]
    a = sd_mecha.model({keys[0]: tensor((8,))}, config="sd1-ldm")
    b = sd_mecha.model({keys[1]: tensor((8,), seed=1)}, config="sd1-ldm")
    got = merged(method(a, b))
    assert torch.equal(got[keys[0]], tensor((8,)))
    assert torch.equal(got[keys[1]], 2 * tensor((8,), seed=1))


def test_a_key_relation_names_the_keys_of_its_own_call() -> None:
    """Keys of one shape share a template; what each call is told must be its own all the same."""

    @make(reuse_outputs=False)
    class by_relation:
        @staticmethod
        def map_keys(builder: Any) -> None:
            for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
                builder[key] = builder.a.keys[key]

        def __call__(self, a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(StateDict[Tensor]):
            ((out,), inputs) = kwargs["key_relation"]
            assert out == kwargs["key"]
            return {out: a[inputs["a"][0]] + 1}

    model = {"x": torch.zeros(2), "y": torch.ones(2)}
    got = merged(by_relation(sd_mecha.model(model)))
    assert got["x"].tolist() == [1.0, 1.0]
    assert got["y"].tolist() == [2.0, 2.0]
