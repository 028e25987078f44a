"""How the engine calls merge methods: with what, how often, on which instance."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.errors import ContractError
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict
from tests.execution.support import Calls, make, merged, planning, tensor, tiles

DELTA = {"strict_merge_space": None}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_rows_method_sees_entire_rows_and_where_they_lie() -> None:
    calls = Calls()

    @make(tiling="rows")
    def by_row(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        tile = kwargs["tile"]
        calls.add(planning=planning(a), shape=tuple(a.shape), tile=(tile.start, tile.stop, tile.numel))
        return a / a.flatten(1).norm(dim=1).reshape(-1, *[1] * (a.dim() - 1))

    a = tensor((50, 4, 1024))
    with tiles(3 << 12, 1 << 13):
        got = merged(by_row(sd_mecha.model({"w": a})), threads=2)
    assert torch.equal(got["w"], by_row.__wrapped__(a, tile=_Tile))
    calls.seen.pop()
    assert {s[1:] for s in calls.of("shape")} == {(4, 1024)}
    assert len(calls.real()) > 10
    covered = sorted(calls.of("tile"))
    assert covered[0][0] == 0
    assert covered[-1][1] == a.numel()
    assert all(left[1] == right[0] for left, right in itertools.pairwise(covered))
    assert {t[2] for t in covered} == {a.numel()}


class _Tile:
    start, stop, numel = 0, 1, 1


def test_two_outputs_of_equal_size_keep_their_own_rows() -> None:
    """Rows of 4096 and rows of 8192 in tensors with the same number of elements, made by one program."""

    @make(tiling="rows")
    def by_row(a: Parameter(Tensor)) -> Return(Tensor):
        return a - a.mean(1, keepdim=True)

    class both:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["p", "q"] = builder.keys["p"] & builder.keys["q"]

        def __call__(self, a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(StateDict[Tensor]):
            return {"p": a["p"] * 1, "q": a["q"] * 1}

    p, q = tensor((4, 8192)), tensor((8, 4096), seed=1)
    recipe = by_row(make()(both)(sd_mecha.model({"p": p, "q": q})))
    with tiles(1 << 13, 1 << 13):
        got = merged(recipe, threads=2)
    assert torch.equal(got["p"], p - p.mean(1, keepdim=True))
    assert torch.equal(got["q"], q - q.mean(1, keepdim=True))


def test_rows_of_tensors_without_a_first_dimension_worth_cutting() -> None:
    @make(tiling="rows")
    def by_row(a: Parameter(Tensor), b: Parameter(Tensor)) -> Return(Tensor):
        return a * b

    values = {"vector": tensor((9000,)), "number": tensor(()), "empty": tensor((0, 3)), "prime": tensor((3, 4099))}
    got = merged(by_row(sd_mecha.model(values), sd_mecha.model(values)))
    for key, value in values.items():
        assert torch.equal(got[key], value * value)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", ["whole", "elementwise"])
def test_every_kind_of_parameter_arrives_as_declared(tiling: str) -> None:
    calls = Calls()

    @make(tiling=tiling)
    def everything(
        a: Parameter(Tensor),
        *rest: Parameter(StateDict[Tensor]),
        number: Parameter(float) = 2,
        count: Parameter(int) = 3.0,
        flag: Parameter(bool) = True,
        text: Parameter(str) = "x",
        weight: Parameter(Tensor) = 0.5,
        by_key: Parameter(float) = 1.0,
        **kwargs: Any,
    ) -> Return(Tensor):
        key = kwargs["key"]
        calls.add(
            planning=planning(a),
            key=key,
            types=(type(number), type(count), type(flag), type(text), type(weight), type(by_key)),
            values=(number, count, flag, text, float(weight), by_key),
            rest=[list(r) for r in rest],
            relation=(kwargs["key_relation"].outputs, dict(kwargs["key_relation"].inputs)),
            extra=sorted(kwargs),
        )
        return a + sum(r[key] for r in rest) * weight * by_key

    a, b, c = (sd_mecha.model({"x": tensor((9000,), seed=s), "y": tensor((5,), seed=s)}) for s in range(3))
    got = merged(everything(a, b, c, by_key={"x": 2.0, "y": 3}), threads=2)
    for key, factor, shape in (("x", 2.0, (9000,)), ("y", 3.0, (5,))):
        x, y, z = (tensor(shape, seed=s) for s in range(3))
        assert torch.allclose(got[key], x + (y + z) * 0.5 * factor)
    assert {c["types"] for c in calls.real()} == {(float, int, bool, str, Tensor, float)}
    assert {c["values"] for c in calls.real()} == {(2.0, 3, True, "x", 0.5, f) for f in (2.0, 3.0)}
    for call in calls.real():
        assert call["rest"] == [[call["key"]]] * 2
        assert call["relation"][0] == (call["key"],)
        assert call["relation"][1]["a"] == call["relation"][1]["rest"] == (call["key"],)
        tile = ["tile"] if tiling == "elementwise" else []
        assert call["extra"] == ["cache", "key", "key_relation", "output_reused", *tile]


def test_no_varargs_and_one_varargs() -> None:
    @make(tiling="elementwise")
    def total(a: Parameter(Tensor), *rest: Parameter(Tensor)) -> Return(Tensor):
        return a + sum(rest) if rest else a.clone()

    m = sd_mecha.model({"w": tensor((10,))})
    assert torch.equal(merged(total(m))["w"], tensor((10,)))
    assert torch.equal(merged(total(m, m, m))["w"], tensor((10,)) + 2 * tensor((10,)))


def test_a_computed_number_reaches_a_float_parameter() -> None:
    @make
    def largest(a: Parameter(Tensor, "weight")) -> Return(Tensor, "param"):
        return a.abs().max()

    @make(tiling="elementwise")
    def divide(a: Parameter(Tensor, "weight"), by: Parameter(float, "param")) -> Return(Tensor, "weight"):
        assert isinstance(by, float)
        return a / by

    values = {"x": tensor((9000,)), "y": tensor((3, 3))}
    m = sd_mecha.model(values)
    got = merged(divide(m, largest(m)))
    for key, value in values.items():
        assert torch.allclose(got[key], value / value.abs().max())


def test_a_state_dict_is_read_only_where_it_is_asked_for() -> None:
    calls = Calls()

    @make(tiling="elementwise")
    def first_of(*models: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
        calls.add(config=[m.model_config.identifier for m in models], length=[len(m) for m in models])
        return models[0][kwargs["key"]]

    good, bad = sd_mecha.model({"w": tensor((9000,))}), sd_mecha.model({"w": tensor((9000,)) / 0})
    assert torch.equal(merged(first_of(good, bad))["w"], tensor((9000,)))
    assert calls.seen[-1] == {"config": ["structural"] * 2, "length": [1, 1]}


# --- repetition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", ["whole", "elementwise"])
@pytest.mark.parametrize("reuse", [True, False])
def test_a_shared_node_is_evaluated_once(tiling: str, reuse: bool) -> None:
    calls = Calls()

    @make(tiling=tiling, reuse_outputs=reuse)
    def double(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        calls.add(planning=planning(a), reused=kwargs["output_reused"])
        return a * 2

    m = sd_mecha.model({"w": tensor((100,))})
    shared = double(m)
    got = merged(sd_mecha.weighted_sum(shared, sd_mecha.n_average(shared, m)))
    assert torch.allclose(got["w"], tensor((100,)) * (0.5 * 2 + 0.5 * 1.5))
    assert calls.of("reused") == [reuse]
    calls.seen.clear()
    merged(sd_mecha.weighted_sum(shared, m))
    assert calls.of("reused") == [False]


def test_a_class_has_one_instance_for_each_node_and_merge() -> None:
    made: list[int] = []
    used: dict[str, set[int]] = {}

    class counting:
        def __init__(self) -> None:
            made.append(id(self))
            self.alive = made

        def __call__(self, a: Parameter(Tensor), name: Parameter(str) = "", **kwargs: Any) -> Return(Tensor):
            if not planning(a):
                used.setdefault(name, set()).add(id(self))
            return a * 1

    method = make()(counting)
    m = sd_mecha.model({f"k{i}": tensor((50,), seed=i) for i in range(20)})
    x, y = method(m, "x"), method(m, "y")
    merged(sd_mecha.weighted_sum(x, y), threads=4)
    assert {name: len(ids) for name, ids in used.items()} == {"x": 1, "y": 1}
    assert used["x"] != used["y"]


def test_caches_are_handed_through_and_kept_by_the_caller() -> None:
    @make(cache_factory=dict)
    def counted(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        if not planning(a):
            cache = kwargs["cache"]
            cache[kwargs["key"]] = cache.get(kwargs["key"], 0) + 1
        return a * 1

    m = sd_mecha.model({"x": tensor((5,)), "y": tensor((6,))})
    node = counted(m)
    cache = node.create_cache()
    assert cache == {}
    for _ in range(2):
        merged(sd_mecha.weighted_sum(node, m), cache={node: cache}, fallback_model=m)
    assert cache == {"x": 2, "y": 2}
    equal = counted(m)
    merged(equal, cache={node: cache})
    assert cache == {"x": 3, "y": 3}


def test_a_cache_reaches_the_implementation_of_an_interface() -> None:
    @make(is_interface=True, identifier="interface_with_cache")
    def interface(a: Parameter(StateDict[Tensor])) -> Return(Tensor): ...

    @make(implements=interface, cache_factory=dict)
    def implementation(a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
        if kwargs["cache"] is not None:
            kwargs["cache"]["was here"] = True
        return a[kwargs["key"]] * 2

    @make(cache_factory=dict)
    def above(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        if kwargs["cache"] is not None:
            kwargs["cache"]["was here"] = True
        return a * 1

    m = sd_mecha.model({"w": tensor((5,))})
    inner = interface(m)
    outer = above(inner)
    caches: dict[Any, Any] = {inner: {}, outer: {}}
    got = merged(outer, cache=caches)
    assert torch.equal(got["w"], tensor((5,)) * 2)
    assert caches == {inner: {"was here": True}, outer: {"was here": True}}


def test_inputs_and_results_never_share_memory() -> None:
    @make
    def itself(a: Parameter(Tensor)) -> Return(Tensor):
        return a

    @make(tiling="elementwise")
    def spoil(a: Parameter(Tensor)) -> Return(Tensor):
        return a.mul_(0)

    values = {"w": tensor((10,))}
    got = merged(itself(sd_mecha.model(values)))
    got["w"].zero_()
    assert torch.equal(values["w"], tensor((10,)))
    merged(spoil(sd_mecha.model(values)))
    assert torch.equal(values["w"], tensor((10,)))


def test_a_wrong_shape_names_method_and_key() -> None:
    @make(identifier="liar", tiling="elementwise")
    def liar(a: Parameter(Tensor)) -> Return(Tensor):
        return a if a.numel() == 1 else a[:-1]

    with pytest.raises(ContractError, match="liar") as caught:
        merged(liar(sd_mecha.model({"w": tensor((100,))})))
    assert 'tiling="whole"' in str(caught.value)

    @make(identifier="other_liar")
    def other_liar(a: Parameter(Tensor)) -> Return(Tensor):
        return a if a.is_meta else a[:-1]

    with pytest.raises(ContractError, match=r"other_liar.*'w'"):
        merged(other_liar(sd_mecha.model({"w": tensor((100,))})))
