"""Laws of the methods that leave out a random part: how much is kept, that the mean stays, and what masks depend on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sd_mecha
from sd_mecha.builtin.methods.random_bits import SEGMENT, uniform
from sd_mecha.extensions import merge_methods
from sd_mecha.testing import check_merge_method

N = 40_000
ONES = torch.ones(N)


def merged(method: str, models: list[dict[str, torch.Tensor]], **options: Any) -> dict[str, torch.Tensor]:
    nodes = [sd_mecha.model(model, merge_space="delta") for model in models]
    recipe = merge_methods.resolve(method)(*nodes, **options)
    got = sd_mecha.merge(recipe, strict_merge_space="delta", merge_dtype=None, output_dtype=None)
    return {key: value for key, value in got.items() if key != "__metadata__"}


def mask(method: str, seed: int, key: str = "w", position: int = 0, count: int = 1) -> torch.Tensor:
    models = [{key: ONES if i == position else torch.zeros(N)} for i in range(count)]
    return merged(method, models, seed=seed, probability=0.5, **({"k": 1.0} if "ties" in method else {}))[key] != 0


METHODS = ("dropout", "ties_sum_with_dropout")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_repeats_and_everything_else_changes_the_mask(method: str) -> None:
    masks = {
        "plain": mask(method, 1),
        "seed": mask(method, 2),
        "key": mask(method, 1, key="v"),
        "position": mask(method, 1, position=1, count=2),
    }
    assert torch.equal(mask(method, 1), masks["plain"])
    bound = 5 * math.sqrt(0.25 / N)
    for (first, a), (second, b) in itertools.combinations(masks.items(), 2):
        assert abs(float((a == b).double().mean()) - 0.5) < bound, (first, second)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_the_mean_stays_whatever_the_number_of_models(method: str, count: int, probability: float) -> None:
    options = {"k": 1.0} if "ties" in method else {}
    got = merged(method, [{"w": ONES}] * count, probability=probability, seed=7, **options)["w"]
    spread = math.sqrt(probability / (1 - probability) / count / N)
    assert abs(float(got.double().mean()) - 1) < 5 * spread
    if count == 1:
        kept = float((got != 0).double().mean())
        assert abs(kept - (1 - probability)) < 5 * math.sqrt(probability * (1 - probability) / N)
        assert all(math.isclose(value, 1 / (1 - probability), rel_tol=1e-5) for value in got[got != 0].unique())


@pytest.mark.parametrize("overlap", [-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("emphasis", [0.0, 0.5, 1.0])
def test_overlap_keeps_the_mean_too(overlap: float, emphasis: float) -> None:
    got = merged("dropout", [{"w": ONES}] * 3, probability=0.5, overlap=overlap, overlap_emphasis=emphasis, seed=3)["w"]
    assert abs(float(got.double().mean()) - 1) < 5 * math.sqrt(5 / N)


def test_overlap_decides_how_many_models_keep_an_entry() -> None:
    models = [{"w": torch.full((N,), 10.0**i)} for i in range(3)]
    options = {"probability": 0.5, "rescale": 0.0, "seed": 5}
    disjoint = merged("dropout", models, overlap=0.0, **options)["w"] * 3
    together = merged("dropout", models, overlap=0.0, overlap_emphasis=1.0, **options)["w"] * 3
    assert set(disjoint.round().unique().tolist()) == {0.0, 1.0, 10.0, 100.0}
    assert set(together.round().unique().tolist()) == {0.0, 111.0}
    independent = [
        merged("dropout", models, overlap=o, overlap_emphasis=e, **options)["w"] for o, e in ((1.0, 0.0), (3.0, 1.0))
    ]
    assert torch.equal(*independent)
    assert len((independent[0] * 3).round().unique()) == 8


def test_della_keeps_large_entries_more_often_and_the_mean_everywhere() -> None:
    size = torch.linspace(0.5, 1.5, N)[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    got = merged("ties_sum_with_dropout", [{"w": size}], probability=0.6, della_eps=0.4, k=1.0, seed=2)["w"]
    order = size.argsort()
    for part, (kept, values) in enumerate(
        zip((got != 0)[order].view(4, -1), (got / size)[order].view(4, -1), strict=True)
    ):
        expected = 0.4 + 0.4 * ((part + 0.5) / 4 - 0.5)
        assert abs(float(kept.double().mean()) - expected) < 5 * math.sqrt(0.25 / (N / 4))
        assert abs(float(values.double().mean()) - 1) < 5 * math.sqrt(4 / (N / 4))
    reverse = merged("ties_sum_with_dropout", [{"w": size}], probability=0.6, della_eps=-0.4, k=1.0, seed=2)["w"]
    assert float((reverse != 0)[order][: N // 4].double().mean()) > 0.5


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=3))
@settings(max_examples=25)
def test_nothing_left_out_is_the_method_without_dropout(values: list[list[float]]) -> None:
    models = [{"w": torch.tensor(v)} for v in values]
    for options in ({"k": 0.5}, {"k": 1.0, "apply_stock": True}, {"k": 1.0, "apply_median": True}, {"vote_sgn": True}):
        got = merged("ties_sum_with_dropout", models, probability=0.0, seed=1, **options)["w"]
        assert torch.equal(got, merged("ties_sum_extended", models, **options)["w"])
    mean = merged("n_average", models)["w"]
    torch.testing.assert_close(merged("dropout", models, probability=0.0)["w"], mean, rtol=1e-5, atol=1e-5)
    for method in METHODS:
        assert merged(method, models, probability=1.0)["w"].tolist() == [0.0] * 5


@pytest.mark.parametrize("method", METHODS)
def test_pieces_threads_and_planning_agree(method: str) -> None:
    examples: list[dict[str, Any]] = [{"probability": 0.5, "seed": 3}]
    if method == "dropout":
        examples.append({"overlap": 0.3, "overlap_emphasis": 0.5, "seed": 3})
    else:
        examples += [{"probability": 0.4, "della_eps": 0.3, "k": 0.5, "seed": 4}, {"apply_stock": True, "seed": 5}]
    check_merge_method(merge_methods.resolve(method), examples=examples, dtypes=(torch.float32, torch.bfloat16))


def test_order_of_keys_and_other_keys_do_not_matter() -> None:
    tensors = {name: torch.randn(300) for name in "abc"}
    whole = merged("dropout", [tensors], seed=1)
    for name in tensors:
        assert torch.equal(merged("dropout", [{name: tensors[name]}], seed=1)[name], whole[name])


def test_a_seed_is_drawn_when_a_node_is_made_and_stands_in_the_recipe() -> None:
    model = sd_mecha.model({"w": ONES})
    delta = sd_mecha.model("delta.safetensors", merge_space="delta")
    for make in (
        lambda: sd_mecha.ties_sum_with_dropout(delta),
        lambda: sd_mecha.ties_sum_with_dropout(delta, seed=None),
        lambda: merge_methods.resolve("dropout")(delta),
        lambda: sd_mecha.dropout(delta, delta),
        lambda: sd_mecha.add_ties_with_dare(delta, delta),
    ):
        first, second = make(), make()
        assert first != second
        assert sd_mecha.deserialize(sd_mecha.serialize(first, finalize=False)) == first
    assert sd_mecha.ties_sum_with_dropout(delta, seed=3) == sd_mecha.ties_sum_with_dropout(delta, seed=3)
    recipe = sd_mecha.dropout(model, sd_mecha.model({"w": ONES * 3}))
    once, again = (sd_mecha.merge(recipe)["w"] for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("seed", [-1, 0, 2**70])
def test_every_integer_is_a_seed(seed: int) -> None:
    kept = float((merged("dropout", [{"w": ONES}], seed=seed, probability=0.5)["w"] != 0).double().mean())
    assert abs(kept - 0.5) < 5 * math.sqrt(0.25 / N)


def test_random_numbers_are_uniform_and_independent_across_streams() -> None:
    x = torch.empty(1 << 16)
    streams = torch.stack([uniform(*args, 0, x) for args in ((1, "k", 0), (1, "k", 1), (1, "l", 0), (2, "k", 0))])
    assert bool(((streams >= 0) & (streams < 1)).all())
    counts = torch.histc(streams[0], 256, 0, 1)
    chi = float(((counts - 256) ** 2 / 256).sum())
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
    off_diagonal = np.corrcoef(streams.numpy()) - np.eye(4)
    assert np.abs(off_diagonal).max() < 5 / 256
    for lag in (1, 2, 64, 320):
        assert abs(float(torch.corrcoef(torch.stack([streams[0, lag:], streams[0, :-lag]]))[0, 1])) < 5 / 256


@given(start=st.integers(0, 1 << 40), length=st.integers(0, 50), cut=st.integers(0, 50))
def test_random_numbers_depend_on_the_index_alone(start: int, length: int, cut: int) -> None:
    cut = min(cut, length)
    whole = uniform(5, "key", 2, start, torch.empty(length))
    parts = [
        uniform(5, "key", 2, start, torch.empty(cut)),
        uniform(5, "key", 2, start + cut, torch.empty(length - cut)),
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_random_numbers_go_on_where_hash_keys_change() -> None:
    around = uniform(0, "k", 0, SEGMENT - 3, torch.empty(6))
    assert torch.equal(around[3:], uniform(0, "k", 0, SEGMENT, torch.empty(3)))
    assert not torch.equal(around[3:], uniform(0, "k", 0, 0, torch.empty(3)))
