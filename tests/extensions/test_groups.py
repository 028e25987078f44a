"""Statistics per row and per column are exact, and the same however a tensor is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha.extensions import groups as module
from sd_mecha.extensions.groups import GroupGram, GroupMax, Groups

SHAPES = [(), (1,), (7,), (5, 3), (4, 3, 2), (1, 6), (6, 1), (40, 30)]
KINDS = [Groups.columns, Groups.rows]
Kind = Callable[[tuple[int, ...]], Groups]


def by_group(x: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The elements of x as a matrix with one row for each group."""
    if x.dim() < 2:
        return x.reshape(1, -1)
    matrix = x.reshape(len(x), -1)
    return matrix if kind == Groups.rows else matrix.T


def answer(tensors: list[torch.Tensor], groups: Groups, cuts: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The maxima and inner products of tensors seen in pieces, the last piece first."""
    numel = tensors[0].numel()
    ranges = list(itertools.pairwise([0, *(cut for cut in cuts if 0 < cut < numel), numel]))[::-1]
    maxima = []
    for x in tensors:
        state = GroupMax(x, groups).state(numel)
        for start, stop in ranges:
            state.add(GroupMax(x.reshape(-1)[start:stop], groups), start)
        maxima.append(state.finish())
    state = GroupGram(tensors, groups).state(numel)
    for start, stop in ranges:
        state.add(GroupGram([x.reshape(-1)[start:stop] for x in tensors], groups), start)
    return maxima, state.finish()


@pytest.mark.parametrize("kind", KINDS)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-30, 1.0, 1e20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    cuts=st.lists(st.integers(1, 1200), unique=True).map(sorted),
    leaf=st.sampled_from([1, 7, 64, module.LEAF]),
)
def test_maxima_and_inner_products(
    kind: Kind, shape: tuple[int, ...], seed: int, scale: float, dtype: torch.dtype, cuts: list[int], leaf: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x, y = x * scale, y / 7
    groups = kind(shape)
    with mock.patch.object(module, "LEAF", leaf):
        maxima, products = answer([x, y], groups, cuts)
        again = answer([x, y], groups, [])
    u, v = by_group(x, kind).double(), by_group(y, kind).double()
    assert torch.equal(maxima[0], u.abs().amax(1))
    assert torch.equal(maxima[1], v.abs().amax(1))
    expected = torch.stack([(u * u).sum(1), (u * v).sum(1), (v * v).sum(1)])
    norms = torch.stack([expected[0], (expected[0] * expected[2]).sqrt(), expected[2]])
    assert bool(((products - expected).abs() <= (1e-13 if dtype == torch.float64 else 1e-6) * norms).all())
    assert torch.equal(again[1], products)


def test_leaves_of_the_usual_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((300, 999), (3, 50_000), (70_000,)):
        x, y = (torch.randn(shape, generator=generator) for _ in range(2))
        numel = x.numel()
        for kind in KINDS:
            groups = kind(shape)
            _, products = answer([x, y], groups, [])
            expected = (by_group(x, kind).double() * by_group(y, kind).double()).sum(1)
            torch.testing.assert_close(products[1], expected, atol=1e-3, rtol=1e-5)
            for cuts in (range(4096, numel, 4096), range(12345, numel, 50_000), [numel // 2 + 1]):
                assert torch.equal(answer([x, y], groups, list(cuts))[1], products)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_spread_gives_each_element_the_value_of_its_group(kind: Kind, shape: tuple[int, ...]) -> None:
    groups = kind(shape)
    values = torch.arange(groups.count)
    numel = groups.count * groups.size
    matrix = values.view(-1, 1).expand(groups.count, groups.size)
    expected = (matrix if kind == Groups.rows else matrix.T).reshape(-1)
    for start, length in ((0, numel), (0, min(2, numel)), (numel // 3, numel - numel // 3), (numel - 1, 1)):
        assert torch.equal(groups.spread(values, start, length), expected[start : start + length])


def test_groups_of_zeros_and_small_groups_beside_large_ones() -> None:
    x = torch.tensor([[1e-18, 0.0, 1e18], [2e-18, 0.0, -1e18]], dtype=torch.float64)
    _, products = answer([x], Groups.columns((2, 3)), [])
    torch.testing.assert_close(products[0], torch.tensor([5e-36, 0.0, 2e36], dtype=torch.float64), atol=0, rtol=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_its_own_group_only(bad: float) -> None:
    x = torch.tensor([[1.0, bad], [2.0, 3.0]])
    _, products = answer([x], Groups.columns((2, 2)), [])
    assert products[0, 0] == 5.0
    assert torch.isnan(products[0, 1])
