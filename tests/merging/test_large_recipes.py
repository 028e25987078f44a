"""Recipes that are long, deep or wide are merged like any other."""

from __future__ import annotations

import torch

import sd_mecha

ONE, OTHER = ({"w": torch.full((3,), value), "v": torch.full((2, 2), value)} for value in (1.0, 3.0))


def test_a_chain_of_merges() -> None:
    node = sd_mecha.model(ONE)
    for _ in range(3000):
        node = sd_mecha.weighted_sum(node, sd_mecha.model(OTHER), alpha=1.0)
    assert sd_mecha.merge(node)["w"].tolist() == [3.0] * 3


def test_a_ladder_that_would_double_with_every_level() -> None:
    node = sd_mecha.weighted_sum(sd_mecha.model(ONE), sd_mecha.model(OTHER))
    for _ in range(64):
        node = sd_mecha.weighted_sum(node, node)
    for memoize in (True, False):
        assert sd_mecha.merge(node, memoize_intermediates=memoize)["v"].unique().tolist() == [2.0]


def test_many_models() -> None:
    models = [sd_mecha.model({"w": torch.full((3,), float(i))}) for i in range(1001)]
    assert sd_mecha.merge(sd_mecha.n_average(*models), output_dtype=None)["w"].tolist() == [500.0] * 3
