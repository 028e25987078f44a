"""The conformance checks for merge methods pass on honest methods and catch each kind of broken promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.errors import ContractError
from sd_mecha.extensions import merge_methods
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method
from sd_mecha.extensions.reductions import Sum
from sd_mecha.testing import check_merge_method

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "add_cosine_a": [{"alpha": 0.3}, {"alpha": 1.0}],
    "add_cosine_b": [{"alpha": 0.3}, {"alpha": 1.0}],
    "add_difference": [{}, {"alpha": 0.3}],
    "cast": [{}, {"dtype": "float16"}],
    "clamp": [{}, {"stiffness": 0.4}],
    "crossover": [{}, {"tilt": 0.7}, {"tilt": 1.0, "alpha": 0.3}],
    "geometric_median": [{}, {"maxiter": 0}],
    "geometric_sum": [{}, {"alpha": 0.0}, {"alpha": 1.3}],
    "model_stock": [{}, {"filter_wise": True}, {"pairs": "adjacent", "bounded": False}],
    "omit_component": [{"component": "keys"}],
    "pick_component": [{"component": "keys"}],
    "slerp": [{"alpha": 0.0}, {"alpha": 0.3}, {"alpha": 1.0}],
    "tensor_sum": [{}, {"width": 0.3, "offset": 0.9}],
    "ties_sum": [{}, {"k": 0.3, "vote_sgn": True}],
    "ties_sum_extended": [{}, {"apply_stock": True}, {"apply_median": True, "k": 1.0}],
    "top_k_tensor_sum": [{}, {"width": 0.3, "offset": 0.9}],
    "weighted_sum": [{"alpha": 0.0}, {"alpha": 0.3}, {"alpha": 1.0}],
}
SKIPS_EVERYTHING = {"omit_component"}  # of the one component that the trial model has
READS_ADAPTERS = {"adapter_delta"}  # of random tensors it makes nothing; tests/adapters has tests of its own

BUILT_IN = [
    pytest.param(method, id=method.identifier)
    for method in merge_methods.get_all()
    if method.interface is None
    and method.identifier not in SKIPS_EVERYTHING | READS_ADAPTERS
    and method.__module__.startswith("sd_mecha.builtin.methods")
]


@pytest.mark.parametrize("method", BUILT_IN)
def test_built_in_methods_conform(method: merge_methods.MergeMethod) -> None:
    examples = EXAMPLES.get(method.identifier, [{}])
    if method.identifier.startswith("ties"):  # several passes over 65,536 counters each
        check_merge_method(method, examples=examples, shapes=[(), (7,), (33, 65)], dtypes=[torch.float32])
    else:
        check_merge_method(method, examples=examples)


def make(fn: Any = None, **options: Any) -> Any:
    """A merge method that nobody else sees."""
    return merge_method(register=False, **options) if fn is None else merge_method(register=False)(fn)


@make(tiling="elementwise")
def honest(a: Parameter(Tensor), b: Parameter(Tensor), alpha: Parameter(float) = 0.5) -> Return(Tensor):
    return a + b * alpha


@make(tiling="elementwise")
def writes_into_its_input(a: Parameter(Tensor), b: Parameter(Tensor)) -> Return(Tensor):
    return a.add_(b)


@make(tiling="elementwise")
def looks_at_its_neighbours(a: Parameter(Tensor)) -> Return(Tensor):
    return a - a.mean()


@make(tiling="elementwise")
def forgets_the_rest(a: Parameter(Tensor)) -> Return(Tensor):
    total = yield Sum(a)
    return a / total + a.sum() * 0.5


@make(tiling="elementwise")
def changes_the_shape(a: Parameter(Tensor)) -> Return(Tensor):
    return a.sum()


@make(tiling="rows")
def mixes_rows(a: Parameter(Tensor)) -> Return(Tensor):
    return a - a.mean(0)


@make
def plans_another_shape(a: Parameter(Tensor)) -> Return(Tensor):
    return a.reshape(-1) if a.is_meta else a


@make
def plans_another_dtype(a: Parameter(Tensor)) -> Return(Tensor):
    return a if a.is_meta else a.double().float()


@make
def looks_and_shrinks(a: Parameter(Tensor)) -> Return(Tensor):
    return a.reshape(-1)[: int((a > 0).sum().item())]


@make(tiling="pieces")
def makes_a_square(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
    tile = kwargs.get("tile")
    square = torch.outer(a.reshape(-1), a.reshape(-1))
    return square if tile is None else square.reshape(-1)[tile.start : tile.stop]


@make(tiling="pieces")
def makes_another_piece(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
    tile = kwargs.get("tile")
    return a if tile is None else a.reshape(-1)[: tile.stop - tile.start]


@make(tiling="select")
def computes_after_all(a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
    return a[kwargs["key"]] * 2


@make(tiling="shape")
def peeks(a: Parameter(Tensor, "weight")) -> Return(float, "param"):
    return 0.0 if a.is_meta else float(a.sum())


@make
def rolls_dice(a: Parameter(Tensor)) -> Return(Tensor):
    return a + torch.rand(())


BROKEN = [
    (writes_into_its_input, (3, 5), "modified its tensor input number 0"),
    (looks_at_its_neighbours, (3, 5), "on their own differ from those of the whole"),
    (forgets_the_rest, (3, 5), "on their own differ from those of the whole"),
    (changes_the_shape, (3, 5), r"returns \(\) for inputs of \(3, 5\)"),
    (mixes_rows, (4, 5), "rows .* on their own differ"),
    (makes_another_piece, (3, 5), "elements .* on their own differ from those of the rest"),
    (plans_another_shape, (3, 5), r"planning expects .*shape=\(15,\)"),
    (looks_and_shrinks, (3, 5), "cannot run on the meta device"),
    (computes_after_all, (3, 5), "none of its inputs"),
    (peeks, (3, 5), "other numbers of that shape"),
    (rolls_dice, (3, 5), "returns different results"),
]


@pytest.mark.parametrize(("method", "shape", "message"), BROKEN, ids=[method.identifier for method, _, _ in BROKEN])
def test_broken_promises_are_caught(method: merge_methods.MergeMethod, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        check_merge_method(method, shapes=[shape], dtypes=[torch.float32])
    text = str(caught.value)
    assert method.identifier in text
    assert f"shape {shape}" in text
    assert "torch.float32" in text


def test_a_result_in_pieces_is_larger_than_what_it_is_made_of() -> None:
    check_merge_method(makes_a_square, shapes=[(300,)], dtypes=[torch.float32])
    model = sd_mecha.model({"w": torch.arange(3000.0)})
    with sd_mecha.plan(sd_mecha.weighted_sum(makes_a_square(model), makes_a_square(model))) as plan:
        assert max(template.whole_bytes for template in plan.templates) < 100_000


def test_a_wrong_dtype_is_caught() -> None:
    with pytest.raises(ContractError, match=r"dtype=torch\.float16"):
        check_merge_method(plans_another_dtype, shapes=[(3,)], dtypes=[torch.float16])


def test_an_honest_method_passes() -> None:
    check_merge_method(honest, examples=[{}, {"alpha": -1.0}])


def test_the_message_shows_the_example() -> None:
    @make(tiling="elementwise")
    def sometimes_wrong(a: Parameter(Tensor), mode: Parameter(str) = "good") -> Return(Tensor):
        return a * 2 if mode == "good" else a - a.mean()

    with pytest.raises(ContractError, match="'mode': 'bad'"):
        check_merge_method(sometimes_wrong, examples=[{}, {"mode": "bad"}])


def test_interfaces_and_missing_examples_are_explained() -> None:
    with pytest.raises(ValueError, match="check its implementations"):
        check_merge_method(merge_methods.resolve("exchange_ema"))
    with pytest.raises(ValueError, match="'component'"):
        check_merge_method(merge_methods.resolve("pick_component"))
    with pytest.raises(ValueError, match="no parameter 'alhpa'"):
        check_merge_method(honest, examples=[{"alhpa": 1.0}])
