"""Laws of geometric interpolation, and of weights that follow from cosines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sd_mecha
from tests.methods import reference
from tests.methods.laws import SHARES, assert_close, assert_same_bits, law, merged, tensors

COSINES = ("add_cosine_a", "add_cosine_b")


@law
@given(models=tensors(2), alpha=st.floats(0.01, 0.99))
def test_geometric_sum(models: list[torch.Tensor], alpha: float) -> None:
    a, b = (m.numpy() for m in models)
    assert_close(merged("geometric_sum", models, alpha=alpha), reference.geometric_sum(a, b, alpha))


@law
@given(models=tensors(2))
def test_the_ends_of_a_geometric_sum_are_its_inputs(models: list[torch.Tensor]) -> None:
    assert_same_bits(merged("geometric_sum", models, alpha=0.0), models[0])
    assert_same_bits(merged("geometric_sum", models, alpha=1.0), models[1])
    switch = (torch.arange(models[0].numel()) % 2).to(torch.float64).view(models[0].shape)
    alpha = sd_mecha.model({"w": switch}, merge_space="param")
    assert_same_bits(merged("geometric_sum", models, alpha=alpha), torch.where(switch == 0, *models))


@law
@given(models=tensors(2), alpha=st.floats(0.01, 0.99))
def test_zero_is_a_fixed_point_of_a_geometric_sum(models: list[torch.Tensor], alpha: float) -> None:
    a, b = models
    got = merged("geometric_sum", [a, b], alpha=alpha)
    assert bool((got[(a == 0) | (b == 0)] == 0).all())
    assert bool(torch.isfinite(got).all())


@law
@given(models=tensors(3), alpha=st.floats(-1, 1))
def test_multiply_quotient(models: list[torch.Tensor], alpha: float) -> None:
    got = merged("multiply_quotient", models, alpha=alpha)
    with np.errstate(all="ignore"):
        expected = reference.multiply_quotient(*(m.numpy() for m in models), alpha)
    defined = np.asarray([m.numpy() != 0 for m in models]).all(0)
    assert_close(got, np.where(defined, expected, models[0].numpy()), 1e-7)


@law
@given(models=tensors(3))
def test_multiply_quotient_changes_only_what_lies_across(models: list[torch.Tensor]) -> None:
    a, b, c = models
    assert_same_bits(merged("multiply_quotient", models, alpha=0.0), a)
    assert_same_bits(merged("multiply_quotient", [a, a, a]), a)
    assert_same_bits(merged("multiply_quotient", [a, b, b]), a)
    got = merged("multiply_quotient", models)
    same_side = (a.abs() - c.abs()) * (b.abs() - c.abs()) >= 0
    assert torch.equal(got[same_side], a[same_side])


@pytest.mark.parametrize("method", COSINES)
@law
@given(models=tensors(2), alpha=st.floats(-1, 1.5))
def test_cosines(method: str, models: list[torch.Tensor], alpha: float) -> None:
    a, b = (m.numpy() for m in models)
    got = merged(method, models, alpha=alpha)
    assert_close(got, reference.add_cosine(a, b, alpha, whole=method == "add_cosine_b"))


@pytest.mark.parametrize("method", COSINES)
@law
@given(models=tensors(2), alpha=SHARES)
def test_cosines_stay_between_their_inputs(method: str, models: list[torch.Tensor], alpha: float) -> None:
    a, b = models
    got, low, high = merged(method, models, alpha=alpha), torch.minimum(a, b), torch.maximum(a, b)
    slack = 1e-12 * (high - low + high.abs())
    assert bool(((got >= low - slack) & (got <= high + slack)).all())
    assert torch.equal(merged(method, [a, a], alpha=alpha), a)


@pytest.mark.parametrize("method", COSINES)
@law
@given(models=tensors(2))
def test_from_alpha_1_on_cosines_give_the_second_model(method: str, models: list[torch.Tensor]) -> None:
    a, b = models
    expected = b if method == "add_cosine_a" or (bool(a.any()) and bool(b.any())) else a
    assert_same_bits(merged(method, models, alpha=1.0), expected)
    assert_same_bits(merged(method, models, alpha=2.5), expected)


@pytest.mark.parametrize("method", COSINES)
@law
@given(models=tensors(2), alpha=SHARES)
def test_alpha_may_differ_by_element(method: str, models: list[torch.Tensor], alpha: float) -> None:
    a, _ = models
    node = sd_mecha.model({"w": torch.full_like(a, alpha)}, merge_space="param")
    assert_close(merged(method, models, alpha=node), merged(method, models, alpha=alpha))


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_cosine_b_with_a_zero_tensor_is_the_first_model(other: float) -> None:
    a, b = torch.full((3, 4), 1 - other, dtype=torch.float64), torch.full((3, 4), other, dtype=torch.float64)
    assert_same_bits(merged("add_cosine_b", [a, b], alpha=0.3), a)


@pytest.mark.parametrize("method", COSINES)
@pytest.mark.parametrize("shape", [(300, 401), (9, 6000), (120_001,), (1, 50_000)])
def test_cosines_of_large_tensors_do_not_depend_on_the_tiles(method: str, shape: tuple[int, ...]) -> None:
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    recipe = getattr(sd_mecha, method)(sd_mecha.model({"w": a}), sd_mecha.model({"w": b}), alpha=-0.2)
    results = [
        sd_mecha.merge(recipe, output_dtype=None, total_buffer_size=size, threads=threads)["w"]
        for size, threads in ((2**28, 0), (2**17, 2))
    ]
    assert torch.equal(*results)
    x, y = a.double().numpy(), b.double().numpy()
    expected = reference.add_cosine(x, y, -0.2, whole=method == "add_cosine_b")
    assert_close(results[0].double(), expected, 1e-5)
