"""Laws of the merge methods, on values that hypothesis makes up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sd_mecha
from sd_mecha.builtin.methods import composed
from tests.methods import reference
from tests.methods.laws import SHARES, assert_close, assert_same_bits, merged, vectors


@pytest.mark.parametrize("method", ["weighted_sum", "slerp"])
@given(tensors=vectors(2), alpha=st.floats(-1, 2))
def test_an_interpolation_runs_backwards(method: str, tensors: list[torch.Tensor], alpha: float) -> None:
    a, b = tensors
    assert_close(merged(method, [a, b], alpha=alpha), merged(method, [b, a], alpha=1 - alpha), 1e-6)


@given(tensors=vectors(2), alpha=st.floats(-1, 2))
def test_weighted_sum(tensors: list[torch.Tensor], alpha: float) -> None:
    a, b = tensors
    assert_close(merged("weighted_sum", [a, b], alpha=alpha), (1 - alpha) * a + alpha * b)


@given(tensors=vectors(2))
def test_ends_hold_element_by_element(tensors: list[torch.Tensor]) -> None:
    a, b = tensors
    switch = torch.arange(len(a), dtype=torch.float64) % 2
    alpha = sd_mecha.model({"w": switch}, merge_space="param")
    for method in ("weighted_sum", "slerp"):
        assert_same_bits(merged(method, [a, b], alpha=alpha), torch.where(switch == 0, a, b))


@given(tensors=vectors(2, min_size=2), alpha=SHARES)
def test_slerp_keeps_the_length_between_those_of_its_inputs(tensors: list[torch.Tensor], alpha: float) -> None:
    a, b = tensors
    lengths = float(a.norm()), float(b.norm())
    got = float(merged("slerp", [a, b], alpha=alpha).norm())
    assert got <= max(lengths) * (1 + 1e-6)
    assert_close(
        merged("slerp", [a, b], alpha=alpha),
        reference.slerp(*map(np.asarray, (a, b)), alpha),
        1e-5,
    )


def test_slerp_of_almost_opposite_vectors_is_exact_in_double_precision() -> None:
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([195.0, 1.0], [-1.0, 0.0]))
    assert_close(merged("slerp", [a, b]), reference.slerp(a.numpy(), b.numpy(), 0.5), 1e-10)


@pytest.mark.parametrize("factor", [-1.0, -3.0, 0.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slerp_of_vectors_on_one_line_is_their_weighted_sum(factor: float, dtype: torch.dtype) -> None:
    a = torch.linspace(-1, 2, 50_000, dtype=dtype)
    models = [sd_mecha.model({"w": t}) for t in (a, a * factor)]
    got = sd_mecha.merge(sd_mecha.slerp(*models, alpha=0.3), merge_dtype=dtype, output_dtype=None)["w"]
    torch.testing.assert_close(got, a * (0.7 + 0.3 * factor), rtol=1e-5, atol=1e-6)


@given(tensors=vectors(3))
def test_n_average(tensors: list[torch.Tensor]) -> None:
    assert_close(merged("n_average", tensors), torch.stack(tensors).mean(0))
    assert torch.equal(merged("n_average", tensors[:1] * 5), tensors[0])


def test_n_average_in_half_precision_neither_overflows_nor_drifts() -> None:
    values = [60_000.0] * 3 + [1.0] * 3
    models = [sd_mecha.model({"w": torch.tensor([v], dtype=torch.float16)}) for v in values]
    got = sd_mecha.merge(sd_mecha.n_average(*models), merge_dtype=None, output_dtype=None)["w"]
    assert got.dtype == torch.float16
    assert got.item() == float(torch.tensor(sum(values) / 6).half())


@given(tensors=vectors(3), alpha=st.floats(-2, 2))
def test_differences_add_up(tensors: list[torch.Tensor], alpha: float) -> None:
    a, b, c = tensors
    assert_close(merged("add_difference", [a, b, c], alpha=alpha), a + alpha * (b - c))
    assert_same_bits(merged("add_difference", [a, b, c], alpha=1.0), a + (b - c))
    nodes = [sd_mecha.model({"w": t}) for t in tensors]
    operators = sd_mecha.merge(nodes[0] + (nodes[1] - nodes[2]) * alpha, merge_dtype=torch.float64, output_dtype=None)[
        "w"
    ]
    assert_close(operators, a + alpha * (b - c))


@given(tensors=vectors(3), alpha=st.floats(-3, 3))
def test_clamp_to_ab_stays_between_a_and_b(tensors: list[torch.Tensor], alpha: float) -> None:
    a, b, _ = tensors
    got = merged("add_difference", tensors, alpha=alpha, clamp_to_ab=True)
    assert bool(((got >= torch.minimum(a, b)) & (got <= torch.maximum(a, b))).all())


@given(tensors=vectors(5), stiffness=SHARES)
def test_clamp_stays_within_its_bounds_and_is_idempotent(tensors: list[torch.Tensor], stiffness: float) -> None:
    bounds = torch.stack(tensors[1:])
    got = merged("clamp", tensors, stiffness=stiffness)
    assert bool(((got >= bounds.amin(0)) & (got <= bounds.amax(0))).all())
    assert_same_bits(merged("clamp", [got, *tensors[1:]], stiffness=stiffness), got)


@given(tensors=vectors(2))
def test_perpendicular_parts_are_orthogonal(tensors: list[torch.Tensor]) -> None:
    a, b = tensors
    part = merged("perpendicular_component", [a, b])
    assert abs(float(part @ a)) <= 1e-9 * float(a.norm() * b.norm()) + 1e-12
    if a.norm() == 0:
        assert part.tolist() == [0.0] * len(a)
    else:
        assert_close(part + a * (a @ b) / (a @ a), b, 1e-8)


@given(tensors=vectors(3), alpha=st.floats(-1, 2))
def test_masks_keep_their_ranges(tensors: list[torch.Tensor], alpha: float) -> None:
    a, b, c = tensors
    limits = {"train_difference_mask": 1.8, "add_opposite_mask": 2.0, "add_strict_opposite_mask": 2.0}
    for method, limit in limits.items():
        mask = merged(method, tensors, alpha=alpha)
        assert bool((mask.abs() <= abs(alpha) * limit * (1 + 1e-12)).all())
    strict = merged("add_strict_opposite_mask", tensors)
    assert bool((strict[(a - c) * (b - c) >= 0] == 0).all())


@given(tensors=vectors(3), k=SHARES, vote=st.booleans())
def test_ties(tensors: list[torch.Tensor], k: float, vote: bool) -> None:
    arrays = [t.numpy() for t in tensors]
    got = merged("ties_sum", tensors, "delta", k=k, vote_sgn=vote)
    assert_close(got, reference.ties_sum(*arrays, k=k, vote_sgn=vote))


@pytest.mark.parametrize(("n", "k", "kept"), [(100, 0.2, 20), (36, 0.2, 7), (7, 0.5, 4), (10, 0.01, 1), (10, 1.0, 10)])
def test_ties_keeps_exactly_its_share(n: int, k: float, kept: int) -> None:
    delta = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    got = merged("ties_sum", [delta], "delta", k=k)
    assert int((got != 0).sum()) == kept
    assert float(got[got != 0].abs().min()) >= float(delta[got == 0].abs().max()) if kept < n else True


def test_ties_keeps_all_that_tie_with_the_last() -> None:
    got = merged("ties_sum", [torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)], "delta", k=0.5)
    assert got.tolist() == [1.0, 1.0, 1.0, 2.0]


def test_ties_votes_count_signs_unless_told_to_weigh_them() -> None:
    deltas = [torch.tensor([v], dtype=torch.float64) for v in (1.0, 2.0, -9.0)]
    assert merged("ties_sum", deltas, "delta").item() == 1.5
    assert merged("ties_sum", deltas, "delta", vote_sgn=True).item() == -9.0


def test_apply_stock_applies_the_model_stock_factor() -> None:
    deltas = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0], [0.0, 1.0])]
    plain = merged("ties_sum_extended", deltas, "delta", k=1.0)
    stock = merged("ties_sum_extended", deltas, "delta", k=1.0, apply_stock=True)
    assert plain.tolist() == [1.0, 1.0]
    assert stock.tolist() == [0.0, 0.0]  # orthogonal deltas agree on nothing
    alone = merged("ties_sum_extended", deltas[:1], "delta", k=1.0, apply_stock=True)
    assert alone.tolist() == [1.0, 0.0]


def test_apply_median_ignores_an_outlier() -> None:
    deltas = [torch.full((3,), v, dtype=torch.float64) for v in (1.0, 1.0, 100.0)]
    got = merged("ties_sum_extended", deltas, "delta", k=1.0, apply_median=True)
    assert_close(got, np.ones(3), 1e-3)


def test_clamp_to_ab_needs_two_of_a_kind() -> None:
    a, b = sd_mecha.model({"w": torch.ones(2)}), sd_mecha.model({"w": torch.ones(2)}, merge_space="delta")
    with pytest.raises(TypeError, match="weight and delta"):
        sd_mecha.add_difference(a, b, clamp_to_ab=True)


def test_add_difference_accepts_a_merge_as_its_delta() -> None:
    a, b, c = (sd_mecha.model({"w": torch.tensor([v])}) for v in (1.0, 5.0, 2.0))
    got = sd_mecha.merge(sd_mecha.add_difference(a, b - c, alpha=0.5), output_dtype=None)["w"]
    assert math.isclose(got.item(), 2.5)


def test_a_known_delta_is_not_subtracted_again() -> None:
    base = sd_mecha.model({"w": torch.tensor([1.0])})
    delta = sd_mecha.model({"w": torch.tensor([4.0])}, merge_space="delta")
    tuned = sd_mecha.model({"w": torch.tensor([3.0])})
    got = sd_mecha.merge(composed.add_difference_ties(base, delta, tuned), output_dtype=None)["w"]
    assert got.item() == 1.0 + (4.0 + 2.0) / 2
