"""The arithmetic of adapters against loops over single elements."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sd_mecha.builtin.adapters.common import fitted
from sd_mecha.builtin.adapters.lokr import lokr_delta
from sd_mecha.builtin.adapters.lora import lora_delta


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_three_factors_of_a_convolution() -> None:
    up, mid, down = drawn(4, 2, 1, 1), drawn(2, 2, 3, 1), drawn(2, 5, 1, 1)
    delta = lora_delta(up, down, mid, alpha=torch.tensor(3.0))
    for o, i, y in itertools.product(range(4), range(5), range(3)):
        expected = sum(up[o, r, 0, 0] * mid[r, s, y, 0] * down[s, i, 0, 0] for r in range(2) for s in range(2))
        assert delta[o, i, y, 0].item() == pytest.approx(float(expected) * 3 / 2)


def test_two_factors_of_a_convolution_are_one_after_the_other() -> None:
    up, down = drawn(4, 2, 1, 1), drawn(2, 5, 3, 3)
    x = drawn(1, 5, 6, 6)
    both = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, lora_delta(up, down)), both)


@pytest.mark.parametrize("alpha", [None, 2.0, 0.0])
def test_alpha_counts_relative_to_the_rank(alpha: float | None) -> None:
    up, down = drawn(4, 8), drawn(8, 3)
    scale = 1.0 if alpha is None else alpha / 8
    stored = None if alpha is None else torch.tensor([alpha])  # some files hold a vector of one element
    torch.testing.assert_close(lora_delta(up, down, alpha=stored), up @ down * scale)


def test_lokr_of_a_kernel() -> None:
    w1, w2 = drawn(2, 3), drawn(2, 2, 3, 3)
    delta = lokr_delta(w1=w1, w2=w2, alpha=torch.tensor(5.0))  # without a rank an alpha means nothing
    assert delta.shape == (4, 6, 3, 3)
    for o, i in itertools.product(range(4), range(6)):
        torch.testing.assert_close(delta[o, i], w1[o // 2, i // 2] * w2[o % 2, i % 2])


def test_lokr_of_products() -> None:
    w1_a, w1_b, w2_a, w2_b, t2 = drawn(2, 4), drawn(4, 3), drawn(4, 2), drawn(4, 5), drawn(4, 4, 3, 3)
    alpha = torch.tensor(2.0)
    w2 = torch.einsum("rsyx,ro,si->oiyx", t2, w2_a, w2_b)
    expected = lokr_delta(w1=w1_a @ w1_b, w2=w2) * 2 / 4
    torch.testing.assert_close(lokr_delta(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, t2=t2, alpha=alpha), expected)


def test_a_kernel_flattened_into_columns_is_the_same_delta() -> None:
    w1, w2_a, w2_b = drawn(2, 3), drawn(2, 4), drawn(4, 2 * 9)
    flat = lokr_delta(w1=w1, w2_a=w2_a, w2_b=w2_b)
    whole = lokr_delta(w1=w1, w2=(w2_a @ w2_b).reshape(2, 2, 3, 3))
    torch.testing.assert_close(fitted(flat, (4, 6, 3, 3)), whole)


@pytest.mark.parametrize(
    ("found", "shape", "fits"),
    [
        ((4, 6), (4, 6, 1, 1), (4, 6, 1, 1)),
        ((4, 6, 1, 1), (4, 6), (4, 6)),
        ((4, 54), (4, 6, 3, 3), (4, 6, 3, 3)),
        ((4, 9, 3, 3), (4, 4, 3, 3), (4, 9, 3, 3)),  # a model with more input channels than usual
        ((4, 9), (4, 6, 1, 1), (4, 9, 1, 1)),
        ((4, 9, 1, 1), (4, 6), (4, 9)),
    ],
)
def test_dimensions_follow_the_weight(found: tuple[int, ...], shape: tuple[int, ...], fits: tuple[int, ...]) -> None:
    delta = drawn(*found)
    assert fitted(delta, shape).shape == fits
    assert torch.equal(fitted(delta, shape).flatten(), delta.flatten())
