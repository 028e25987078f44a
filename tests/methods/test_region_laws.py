"""Laws of merges that splice: rows, ranks, frequencies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sd_mecha
from tests.methods import reference
from tests.methods.laws import SHARES, assert_close, assert_same_bits, law, merged, tensors

WIDTHS = st.floats(-1.5, 1.5)
OFFSETS = st.floats(-2, 2)


@law
@given(models=tensors(2), width=WIDTHS, offset=OFFSETS)
def test_tensor_sum(models: list[torch.Tensor], width: float, offset: float) -> None:
    a, b = models
    got = merged("tensor_sum", models, width=width, offset=offset)
    assert_same_bits(got, torch.from_numpy(reference.tensor_sum(a.numpy(), b.numpy(), width, offset)).view(a.shape))
    assert_same_bits(merged("copy_region", models, width=width, offset=offset), got)


def test_tensor_sum_wraps_around_in_large_tensors_too() -> None:
    a, b = torch.zeros(700, 301), torch.ones(700, 301)
    got = sd_mecha.merge(
        sd_mecha.tensor_sum(sd_mecha.model({"w": a}), sd_mecha.model({"w": b}), width=0.5, offset=0.8),
        output_dtype=None,
        total_buffer_size=2**20,
    )["w"]
    assert got[:, 0].nonzero().flatten().tolist() == [*range(210), *range(560, 700)]
    assert torch.equal(got, got[:, :1].expand_as(got))


@law
@given(models=tensors(2), width=WIDTHS, offset=OFFSETS)
def test_top_k_tensor_sum(models: list[torch.Tensor], width: float, offset: float) -> None:
    a, b = models
    got = merged("top_k_tensor_sum", models, width=width, offset=offset)
    assert_close(got, reference.top_k_tensor_sum(a.numpy(), b.numpy(), width, offset), 0)


@law
@given(models=tensors(2))
def test_all_values_take_the_order_of_the_other_model(models: list[torch.Tensor]) -> None:
    a, b = models
    got = merged("top_k_tensor_sum", models, width=1).flatten()
    assert torch.equal(got.sort().values, a.flatten().sort().values)
    order = torch.argsort(b.flatten(), stable=True)
    assert torch.equal(got[order], a.flatten().sort().values)
    assert_same_bits(merged("top_k_tensor_sum", models, width=0), a)
    assert torch.equal(merged("top_k_tensor_sum", [a, a], width=1), a)


@law
@given(models=tensors(3), width=SHARES, offset=SHARES, top_k=st.booleans())
def test_copy_region_with_a_base_works_on_the_differences(
    models: list[torch.Tensor], width: float, offset: float, top_k: bool
) -> None:
    arrays = [m.numpy() for m in models]
    got = merged("copy_region", models, width=width, offset=offset, top_k=top_k)
    assert_close(got, reference.copy_region(*arrays, width, offset, top_k))


@law
@given(models=tensors(2), alpha=SHARES, tilt=st.floats(-4, 8) | st.sampled_from([0.0, 1.0, 2.0, 3.0, -2.0]))
def test_crossover(models: list[torch.Tensor], alpha: float, tilt: float) -> None:
    a, b = models
    if 0 < abs(tilt - 2 * round(tilt / 2)) < 1e-6:
        return  # a slope so steep that it magnifies the rounding of a frequency
    if a.numel():
        expected = reference.crossover(a.numpy(), b.numpy(), alpha, tilt)
        expected = a if alpha == 0 else b if alpha == 1 else expected
        assert_close(merged("crossover", models, alpha=alpha, tilt=tilt), expected, 1e-7)


@law
@given(models=tensors(2), tilt=st.floats(-4, 8))
def test_the_ends_of_a_crossover_are_its_inputs(models: list[torch.Tensor], tilt: float) -> None:
    assert_same_bits(merged("crossover", models, alpha=0, tilt=tilt), models[0])
    assert_same_bits(merged("crossover", models, alpha=1, tilt=tilt), models[1])
    assert torch.equal(merged("crossover", models[:1] * 2, alpha=0.4, tilt=tilt), models[0])


@law
@given(models=tensors(2), alpha=SHARES, tilt=st.sampled_from([1.0, 3.0, -1.0, 5.0]))
def test_a_crossover_of_odd_tilt_is_a_weighted_sum(models: list[torch.Tensor], alpha: float, tilt: float) -> None:
    assert_close(merged("crossover", models, alpha=alpha, tilt=tilt), merged("weighted_sum", models, alpha=alpha))


@law
@given(models=tensors(2), alpha=SHARES, tilt=st.floats(0.01, 0.99))
def test_a_crossover_splits_what_its_mirror_image_leaves(models: list[torch.Tensor], alpha: float, tilt: float) -> None:
    """What comes from b at one tilt comes from a when the models change places and the filter is turned over."""
    a, b = models
    if 0 < alpha < 1:
        got = merged("crossover", [a, b], alpha=alpha, tilt=tilt)
        assert_close(merged("crossover", [b, a], alpha=1 - alpha, tilt=2 - tilt), got, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_crossover_keeps_the_dtype(dtype: torch.dtype) -> None:
    a, b = (torch.randn(12, 10, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    nodes = [sd_mecha.model({"w": t}) for t in (a, b)]
    got = sd_mecha.merge(sd_mecha.crossover(*nodes, alpha=0.4), merge_dtype=dtype, output_dtype=None)["w"]
    assert got.dtype == dtype
    expected = reference.crossover(a.double().numpy(), b.double().numpy(), 0.4)
    assert_close(got.double(), expected, 4 * torch.finfo(dtype).eps)
