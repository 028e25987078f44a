"""`balance_attention`: attention stays, its sides exchange their scales, and the numbers are those of sd-mecha 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.builtin.methods.attention_balance import exchange
from sd_mecha.builtin.methods.permutation_spec import attention_heads
from sd_mecha.builtin.methods.permutations import channels_of
from sd_mecha.extensions import merge_methods
from tests.methods.golden_sdxl import Tensors, cases, golden_input, merged
from tests.methods.networks import PARTS, compute, random_state

IMPLEMENTATIONS = ["balance_attention_sdxl_sgm", "balance_attention_sd1_ldm"]
ATTENTION = [part for part in PARTS if part.endswith("attention")]


def balanced(tensors: Tensors, config: str) -> Tensors:
    return merged(merge_methods.resolve("balance_attention")(sd_mecha.model(tensors, config=config)))


@pytest.mark.parametrize("case", cases("balance_attention"), ids=["sdxl"])
def test_numbers_are_those_of_sd_mecha_1(case: dict[str, Any]) -> None:
    x = golden_input()
    got = balanced(x, "sdxl-sgm")
    assert got.keys() == case["outputs"].keys()
    for key, expected in case["outputs"].items():
        torch.testing.assert_close(got[key][:24, :24], torch.tensor(expected["block_24x24"]), **case["tolerance"])
        assert got[key].norm().item() == pytest.approx(expected["l2"], rel=1e-5)


@pytest.mark.parametrize("part", ATTENTION)
def test_attention_computes_the_same(part: str) -> None:
    x = random_state(part, seed=1)
    got = balanced(x, PARTS[part][0])
    assert got.keys() == x.keys()
    assert torch.allclose(compute(part, got), compute(part, x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("part", ATTENTION)
def test_both_sides_exchange_their_scales_and_twice_is_not_at_all(part: str) -> None:
    x, config = random_state(part, seed=1), PARTS[part][0]
    got = balanced(x, config)
    for group in {group.keys: group for key, group in attention_heads(config).items() if key in x}.values():
        for runs in group.runs:
            sides = [
                torch.cat([channels_of(tensors[axis.key], axis, runs) for axis in axes], -1)
                for tensors in (x, got)
                for axes in (runs.left, runs.right)
            ]
            left, right, new_left, new_right = (side @ side.mT for side in sides)
            assert torch.allclose(new_left, right, rtol=1e-7, atol=1e-8)
            assert torch.allclose(new_right, left, rtol=1e-7, atol=1e-8)
    again = balanced(got, config)
    assert all(torch.allclose(again[key], tensor, rtol=1e-7, atol=1e-8) for key, tensor in x.items())


def test_heads_that_cannot_be_balanced_stay() -> None:
    part = "sd1 self-attention"
    x = random_state(part, seed=1)
    queries = next(tensor for key, tensor in x.items() if key.endswith("to_q.weight"))
    queries[3] = 0.0  # of the first head, which has 40 channels
    got = balanced(x, "sd1-ldm")
    for key, tensor in x.items():
        if key.endswith(("to_q.weight", "to_k.weight")):
            assert torch.equal(got[key][:40], tensor[:40])
            assert not torch.isclose(got[key][40:], tensor[40:]).all(-1).any()


def test_layers_other_than_attention_stay() -> None:
    x = random_state("sd1 gates", seed=1)
    got = balanced(x, "sd1-ldm")
    assert all(torch.equal(got[key], tensor) for key, tensor in x.items())


@pytest.mark.parametrize("method", IMPLEMENTATIONS)
def test_implementations_are_found_by_name(method: str) -> None:
    interface = merge_methods.resolve("balance_attention").interface
    assert interface is not None
    assert merge_methods.resolve(method) in [candidate for candidate, _ in interface.candidates]


def test_the_map_is_symmetric_and_solves_its_equation() -> None:
    factors = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = factors @ factors.mT
    forth, back = exchange(left, right)
    assert torch.allclose(forth @ left @ forth, right)
    assert torch.allclose(forth, forth.mT)
    assert torch.allclose(forth @ back, torch.eye(6, dtype=torch.float64).expand(3, 6, 6), atol=1e-10)
    assert (torch.linalg.eigvalsh(forth) > 0).all()
