"""How the engine calls a merge method: the context it passes, instances of classes, caches, skipped keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.errors import ContractError, OptionError
from sd_mecha.extensions.key_map import RealizedKeyRelation
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method, skip_key
from sd_mecha.extensions.reductions import Dot, Sum
from tests.extensions.support import model, numbers, run


def test_the_context_tells_key_relation_cache_and_reuse() -> None:
    seen = {}

    @merge_method(register=False)
    def curious(a: Parameter(Tensor), b: Parameter(Tensor) = None, **kwargs: Any) -> Return(Tensor):
        if a.device.type != "meta":
            seen[kwargs["key"]] = kwargs
        return a

    run(curious(model(x=1.0, y=2.0)))
    assert seen.keys() == {"x", "y"}
    assert set(seen["x"]) == {"key", "key_relation", "cache", "output_reused"}
    assert seen["x"]["key"] == "x"
    assert seen["x"]["cache"] is None
    outputs, inputs = seen["x"]["key_relation"]
    assert isinstance(seen["x"]["key_relation"], RealizedKeyRelation)
    assert (outputs, dict(inputs)) == (("x",), {"a": ("x",), "b": ("x",)})
    assert seen["x"]["key_relation"].meta is None


def test_output_reused_says_what_the_method_declared() -> None:
    seen = {}

    def method(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        seen[kwargs["output_reused"]] = True
        return a * 1

    for reuse in (True, False):
        made = merge_method(register=False, reuse_outputs=reuse, identifier=f"reuse_{reuse}")(method)
        shared = made(model(x=[1.0]))
        seen.clear()
        assert numbers(sd_mecha.n_average(shared, shared)) == {"x": [1.0]}
        assert reuse in seen


def test_without_kwargs_nothing_else_is_passed() -> None:
    @merge_method(register=False)
    def simple(a: Parameter(Tensor)) -> Return(Tensor):
        return a + 1

    assert numbers(simple(model(x=1.0))) == {"x": 2.0}


def test_a_tile_says_which_range_is_at_hand() -> None:
    @merge_method(register=False, tiling="elementwise")
    def positions(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        tile = kwargs["tile"]
        assert 0 <= tile.start < tile.stop <= tile.numel
        return torch.arange(tile.start, tile.stop, dtype=a.dtype)

    n = 300_000
    got = run(positions(sd_mecha.model({"x": torch.zeros(n)})), total_buffer_size=1 << 16, merge_dtype="float64")
    assert torch.equal(got["x"], torch.arange(n, dtype=torch.float64))


# --- classes ----------------------------------------------------------------------------------------------------------


class Counting:
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.calls = 0

    def __call__(self, a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        if a.device.type == "meta":
            return a
        self.calls += 1
        return a + self.calls


def test_a_class_has_one_instance_per_node_and_merge() -> None:
    counting = merge_method(register=False, identifier="counting")(Counting)
    node = counting(model(x=0.0, y=0.0))
    assert sorted(t.item() for t in run(node).values()) == [1, 2]
    assert sorted(t.item() for t in run(node).values()) == [1, 2]  # a fresh one for the second merge
    two = sd_mecha.stack(counting(model(x=0.0)), counting(model(x=10.0)))
    assert numbers(two) == {"x": [1.0, 11.0]}


def test_a_class_may_be_called_by_several_workers() -> None:
    counting = merge_method(register=False, identifier="counting")(Counting)
    models = model(**{f"k{i}": 0.0 for i in range(40)})
    got = run(counting(models), threads=4)
    assert len(got) == 40


# --- caches -----------------------------------------------------------------------------------------------------------


@merge_method(register=False, cache_factory=dict)
def remembering(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
    cache, key = kwargs["cache"], kwargs["key"]
    if cache is None or a.device.type == "meta":
        return a * 1
    cache[key] = cache.get(key, 0) + 1
    return a * cache[key]


def test_a_node_makes_the_cache_of_its_method() -> None:
    assert remembering.create_cache() == {}
    assert remembering(model(x=1.0)).create_cache() == {}

    @merge_method(register=False)
    def forgetful(a: Parameter(Tensor)) -> Return(Tensor):
        return a

    assert forgetful(model(x=1.0)).create_cache() is None


def test_a_cache_is_kept_between_merges() -> None:
    node = remembering(model(x=3.0, y=1.0))
    cache = {node: node.create_cache()}
    assert numbers(node, cache=cache) == {"x": 3.0, "y": 1.0}
    assert numbers(node, cache=cache) == {"x": 6.0, "y": 2.0}
    assert cache[node] == {"x": 2, "y": 2}
    assert numbers(node) == {"x": 3.0, "y": 1.0}


def test_a_cache_goes_to_its_node_alone() -> None:
    a, b = remembering(model(x=1.0)), remembering(model(x=10.0))
    cache = {a: {"x": 4}}
    assert numbers(sd_mecha.stack(a, b), cache=cache) == {"x": [5.0, 10.0]}
    assert cache == {a: {"x": 5}}


def test_a_cache_is_found_by_an_equal_node_inside_a_larger_recipe() -> None:
    tensors = {"x": torch.tensor(1.0)}
    one, again = (remembering(sd_mecha.model(tensors)) for _ in range(2))
    cache = {one: {"x": 1}}
    assert numbers(sd_mecha.n_average(again), cache=cache) == {"x": 2.0}


def test_a_cache_for_something_else_is_refused() -> None:
    with pytest.raises(OptionError, match="cache maps recipe nodes to objects; got the key 'x'"):
        run(model(x=1.0), cache={"x": {}})


# --- skipping ---------------------------------------------------------------------------------------------------------


@merge_method(register=False)
def only_x(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
    if kwargs["key"] != "x" and a.device.type != "meta":
        skip_key(kwargs["key"])
    return a


@merge_method(register=False, tiling="elementwise")
def only_x_tiled(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
    if kwargs["key"] != "x" and kwargs["tile"].stop > 1:
        raise sd_mecha.StateDictKeyError(kwargs["key"])
    return a * 1


@pytest.mark.parametrize("method", [only_x, only_x_tiled])
def test_a_skipped_key_is_left_out_or_taken_from_the_fallback(method: Any) -> None:
    a, b = model(x=[1.0, 1.0], y=[2.0, 2.0]), model(x=[8.0, 8.0], y=[9.0, 9.0])
    assert numbers(method(a)) == {"x": [1.0, 1.0]}
    assert numbers(method(a) | b) == {"x": [1.0, 1.0], "y": [9.0, 9.0]}
    assert numbers(method(a), fallback_model=b) == {"x": [1.0, 1.0], "y": [9.0, 9.0]}
    assert numbers(sd_mecha.n_average(method(a), b)) == {"x": [4.5, 4.5]}


# --- contracts --------------------------------------------------------------------------------------------------------


def test_a_result_that_is_no_tensor_is_a_named_error() -> None:
    @merge_method(register=False)
    def odd(a: Parameter(Tensor)) -> Return(Tensor):
        return a if a.device.type == "meta" else [1.0]

    with pytest.raises(ContractError, match="odd returned a list, expected a tensor"):
        run(odd(model(x=[1.0])))


def test_a_shape_other_than_planned_is_a_named_error() -> None:
    @merge_method(register=False)
    def fickle(a: Parameter(Tensor)) -> Return(Tensor):
        return a if a.device.type == "meta" else a[:1]

    with pytest.raises(ContractError, match=r"fickle returned shape \(1,\) at key 'x', expected \(3,\)"):
        run(fickle(model(x=[1.0, 2.0, 3.0])))


def test_an_elementwise_method_that_reduces_is_a_named_error() -> None:
    @merge_method(register=False, tiling="elementwise")
    def reducing(a: Parameter(Tensor)) -> Return(Tensor):
        return a.sum()

    with pytest.raises(ContractError, match=r'reducing promises to work on tiles.*declare tiling="whole"'):
        run(reducing(model(x=[1.0, 2.0])))


def test_a_method_cannot_change_its_inputs_for_others() -> None:
    @merge_method(register=False)
    def careless(a: Parameter(Tensor)) -> Return(Tensor):
        return a.mul_(2)

    tensors = {"x": torch.tensor([1.0, 2.0])}
    a = sd_mecha.model(tensors)
    run(careless(a))
    assert tensors["x"].tolist() == [1.0, 2.0]


# --- streamed reductions ----------------------------------------------------------------------------------------------


@merge_method(register=False, tiling="elementwise")
def normalised(a: Parameter(Tensor)) -> Return(Tensor):
    square = yield Dot(a, a)
    return a / square.sqrt()


@pytest.mark.parametrize("budget", [1 << 15, 1 << 28])
def test_a_streamed_reduction_sees_the_whole_tensor(budget: int) -> None:
    a = torch.randn(100_000, dtype=torch.float64)
    got = run(normalised(sd_mecha.model({"x": a})), merge_dtype="float64", total_buffer_size=budget)
    torch.testing.assert_close(got["x"], a / a.norm())


@pytest.mark.parametrize("threads", [0, 3])
def test_what_is_yielded_later_may_depend_on_earlier_answers(threads: int) -> None:
    @merge_method(register=False, tiling="elementwise")
    def standardised(a: Parameter(Tensor), n: Parameter(Tensor, "param")) -> Return(Tensor):
        mean = (yield Sum(a)) / n
        square = yield Dot(a - mean, a - mean)
        return (a - mean) / (square / n).sqrt()

    a = torch.randn(50_000, dtype=torch.float64)
    got = run(
        standardised(sd_mecha.model({"x": a}), a.numel()),
        merge_dtype="float64", total_buffer_size=1 << 15, threads=threads,
    )  # fmt: skip
    torch.testing.assert_close(got["x"], (a - a.mean()) / a.std(correction=0))


def test_yielding_something_else_is_a_named_error() -> None:
    @merge_method(register=False, tiling="elementwise")
    def wrong(a: Parameter(Tensor)) -> Return(Tensor):
        yield a.sum()

    with pytest.raises(TypeError, match="may yield a reduction or a tuple of them"):
        run(wrong(model(x=[1.0, 2.0])))


def test_a_state_dict_may_be_streamed_too() -> None:
    @merge_method(register=False, tiling="elementwise")
    def fraction(a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
        x = a[kwargs["key"]]
        return x / (yield Sum(x))

    assert numbers(fraction(model(x=[1.0, 3.0]))) == {"x": [0.25, 0.75]}


def test_a_cache_may_be_given_to_the_node_itself() -> None:
    own: dict[str, int] = {}
    node = remembering(model(x=1.0)).set_cache(own)
    assert numbers(sd_mecha.stack(node, model(x=5.0))) == {"x": [1.0, 5.0]}
    assert own == {"x": 1}
    other: dict[str, int] = {}
    assert numbers(node, cache={node: other}) == {"x": 1.0}
    assert (own, other) == ({"x": 1}, {"x": 1})
    assert numbers(node.set_cache(None)) == {"x": 1.0}
    assert own == {"x": 1}
