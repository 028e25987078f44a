"""Laws of model stock and the geometric median."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import sd_mecha
from tests.methods import reference
from tests.methods.laws import assert_close, assert_same_bits, law, merged, tensors
from tests.methods.test_golden_methods import ROOT

OPTIONS = st.fixed_dictionaries({"filter_wise": st.booleans(), "pairs": st.sampled_from(["all", "adjacent"])})


@law
@given(deltas=tensors(3))
def test_model_stock(deltas: list[torch.Tensor]) -> None:
    got = merged("model_stock", deltas, "delta")
    assert_close(got, reference.model_stock(*(d.numpy() for d in deltas)))


@law
@given(deltas=tensors(3))
def test_filter_wise_model_stock_is_model_stock_of_each_row(deltas: list[torch.Tensor]) -> None:
    got = merged("model_stock", deltas, "delta", filter_wise=True)
    if deltas[0].dim() < 2:
        assert_same_bits(got, merged("model_stock", deltas, "delta"))
    else:
        rows = zip(*(d.numpy() for d in deltas), strict=True)
        expected = [reference.model_stock(*row) for row in rows]
        assert_close(got, np.reshape(expected, got.shape))


def test_adjacent_pairs_are_neighbours() -> None:
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    mean = (a + a + b) / 3
    assert_close(merged("model_stock", [a, a, b], "delta", pairs="adjacent"), mean * 3 * 0.5 / 2)
    assert_close(merged("model_stock", [a, b, a], "delta", pairs="adjacent"), mean * 0)
    assert_close(merged("model_stock", [a, b, a], "delta"), mean * 3 * (1 / 3) / (1 + 2 / 3))


@law
@given(deltas=tensors(2), options=OPTIONS)
def test_model_stock_lies_between_the_base_and_the_mean(deltas: list[torch.Tensor], options: dict[str, object]) -> None:
    got, mean = merged("model_stock", deltas, "delta", **options), (deltas[0] + deltas[1]) / 2
    assert bool((got.abs() <= mean.abs() * (1 + 1e-12)).all())
    assert bool((got * mean >= 0).all())


def test_opposed_deltas_are_bounded_unless_told_otherwise() -> None:
    deltas = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.1], [-0.9, 0.1])]
    assert merged("model_stock", deltas, "delta").tolist() == [0.0, 0.0]
    unbounded = merged("model_stock", deltas, "delta", bounded=False)
    cosine = (-0.9 + 0.01) / np.sqrt(1.01 * 0.82)
    assert_close(unbounded, np.array([0.05, 0.1]) * 2 * cosine / (1 + cosine))


@pytest.mark.parametrize("case", ["model_stock_001", "model_stock_002", "model_stock_003"])
def test_the_numbers_of_1_1_8_can_be_had_for_vectors_and_matrices(case: str) -> None:
    names = "abcd"[: int(case[-1]) + 1]
    models = [load_file(ROOT / f"inputs/{name}.safetensors") for name in names]
    golden = load_file(ROOT / f"outputs/{case}.safetensors")
    for key in ("vec", "one", "square", "tall", "wide"):
        deltas = [model[key].double() for model in models]
        got = merged("model_stock", deltas, "delta", filter_wise=True, pairs="adjacent", bounded=False)
        assert_close(got, golden[key].double(), 1e-5)


@law
@given(models=tensors(4))
def test_n_model_stock_adds_what_model_stock_makes_of_the_differences(models: list[torch.Tensor]) -> None:
    base, *tuned = models
    got = merged("n_model_stock", models)
    assert_close(got, base + merged("model_stock", [t - base for t in tuned], "delta"))
    assert_close(merged("n_model_stock", [base, base, base]), base)


@law
@given(models=tensors(3), maxiter=st.sampled_from([0, 1, 7, 100]))
def test_geometric_median(models: list[torch.Tensor], maxiter: int) -> None:
    got = merged("geometric_median", models, maxiter=maxiter)
    expected = reference.geometric_median(np.stack([m.numpy() for m in models]), 1e-6, maxiter, 1e-20)
    assert_close(got, expected, 1e-6)


def test_half_minus_one_outliers_do_not_move_the_geometric_median_far() -> None:
    generator = torch.Generator().manual_seed(1)
    good = [1 + 0.01 * torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(4)]
    bad = [torch.full((50,), value, dtype=torch.float64) for value in (1e6, -1e5, 1e6)]
    assert float((merged("geometric_median", good + bad) - 1).abs().max()) < 0.1


def test_the_geometric_median_of_close_models_is_found_in_single_precision() -> None:
    """Models that share a base differ in the last digits of their inner products only."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(200, 300, generator=generator)
    tuned = [base + 1e-4 * scale * torch.randn(200, 300, generator=generator) for scale in (1, 1, 1, 30)]
    nodes = [sd_mecha.model({"w": t}) for t in tuned]
    recipe = sd_mecha.geometric_median(*nodes)
    got = sd_mecha.merge(recipe, merge_dtype=torch.float32, output_dtype=None)["w"]
    expected = reference.geometric_median(np.stack([t.double().numpy() for t in tuned]), 1e-6, 100, 1e-20)
    error = np.linalg.norm(got.double().numpy() - expected)
    assert error < 1e-3 * np.linalg.norm(expected - base.double().numpy())
