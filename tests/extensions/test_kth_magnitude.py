"""The k-th largest magnitude of a tensor that is seen in tiles is that of the sorted whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha.errors import OptionError
from sd_mecha.extensions.reductions import KthMagnitude

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def found(x: torch.Tensor, k: int, tile: int) -> torch.Tensor:
    state = KthMagnitude(x, k).state(x.numel())
    answer = None
    while answer is None:
        for start in range(0, x.numel(), tile):
            state.add(KthMagnitude(x[start : start + tile], k), start)
        answer = state.finish()
    return answer


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1e-45, -3e-45, 5e-324, 1e-39, 1.0, -1.0, 1.5, math.inf, -7.25]), min_size=1),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_it_is_that_of_the_sorted_magnitudes(values: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    k = data.draw(st.integers(1, len(values)))
    tile = data.draw(st.integers(1, len(values)))
    answer = found(x, k, tile)
    assert answer.dtype == dtype
    assert answer == x.abs().sort(descending=True).values[k - 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.9, 1.0])
def test_many_zeros(dtype: torch.dtype, zeros: float) -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, generator=chance, dtype=torch.float64) * (torch.rand(50_000, generator=chance) >= zeros)
    x = x.to(dtype)
    ordered = x.abs().sort(descending=True).values
    nonzero = int(x.count_nonzero())
    for k in {1, 5_000, nonzero - 1, nonzero, nonzero + 1, 50_000}:
        if 1 <= k <= 50_000:
            assert found(x, k, 20_000) == ordered[k - 1]


@pytest.mark.parametrize("k", [0, 4])
def test_there_has_to_be_such_an_element(k: int) -> None:
    with pytest.raises(OptionError, match=rf"k={k} is outside 1\.\.3"):
        KthMagnitude(torch.ones(3), k).state(3)
