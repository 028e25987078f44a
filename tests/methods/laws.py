"""What the tests of laws share: tensors that hypothesis makes up, a merge of them, and comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

import sd_mecha

law = settings(max_examples=40)
"""How often a law is tried that merges several times."""

FINITE = st.floats(-1e4, 1e4, width=32)
SHARES = st.floats(0.0, 1.0)
SHAPES = ((), (1,), (0,), (6,), (3, 5), (5, 3), (1, 4), (4, 1), (2, 0), (2, 3, 4), (4, 2, 3, 3), (2, 1, 2, 2, 1))


def vectors(count: int, min_size: int = 1) -> st.SearchStrategy[list[torch.Tensor]]:
    """`count` float64 vectors of one length."""

    def of_length(n: int) -> st.SearchStrategy[list[torch.Tensor]]:
        one = st.lists(FINITE, min_size=n, max_size=n).map(lambda v: torch.tensor(v, dtype=torch.float64))
        return st.lists(one, min_size=count, max_size=count)

    return st.integers(min_size, 12).flatmap(of_length)


def tensors(count: int) -> st.SearchStrategy[list[torch.Tensor]]:
    """`count` float64 tensors of one shape, of up to five dimensions: normally distributed, or of small integers."""

    def make(shape: tuple[int, ...], seed: int, whole: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]
        return [(2 * t).round() for t in made] if whole else made

    return st.builds(make, st.sampled_from(SHAPES), st.integers(0, 2**32), st.booleans())


def merged(method: str, tensors: list[torch.Tensor], space: str = "weight", **options: Any) -> torch.Tensor:
    nodes = [sd_mecha.model({"w": tensor}, merge_space=space) for tensor in tensors]
    recipe = getattr(sd_mecha, method)(*nodes, **options)
    strict = "param" if method.endswith("mask") else space
    return sd_mecha.merge(recipe, strict_merge_space=strict, merge_dtype=torch.float64, output_dtype=None, threads=0)[
        "w"
    ]


def assert_close(got: torch.Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    expected = np.asarray(expected)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.numpy(), expected, rtol=tolerance, atol=tolerance * scale)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.view(torch.int64), expected.view(torch.int64))
