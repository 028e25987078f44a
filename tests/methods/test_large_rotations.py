"""Rotations of large matrices: how much memory they need, and what single precision costs them."""

from __future__ import annotations

import math

import pytest
import torch

from sd_mecha.builtin.methods import angles
from sd_mecha.builtin.methods.orthogonal import fractional_orthogonal_matrix_power
from tests.memory import least, needs_proc, printed

SCRIPT = """
import re, sys
import torch
import sd_mecha
from sd_mecha.process import peak_memory

shape, alignment = [int(n) for n in sys.argv[1].split("x")], float(sys.argv[2])
rotate = sd_mecha.extensions.merge_methods.resolve("rotate").__wrapped__

def rotated(a, b):
    return rotate({"w": a}, {"w": b}, key="w", alignment=alignment, alpha=torch.tensor(0.0))

torch.set_num_threads(1)
rotated(torch.randn(30, 20), torch.randn(30, 20))  # loads what is loaded once
a = torch.randn(shape)
b = a + torch.randn(shape)
before = int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
rotated(a, b)
print(peak_memory() - before)
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    ("shape", "alignment", "tensors", "more"),
    [
        ("1280x1280", 1.0, 2, 64),
        ("1280x1280", 0.5, 2, 64),
        ("2560x1280", 1.0, 2, 64),
        ("2560x1280", 0.5, 2, 64),
        ("640x640x3x3", 0.5, 2, 64),
        ("640x2560", 0.5, 2, 64),
        ("1280x2560", 1.0, 2, 64),
        # what turns has twice the rows of the tensor, in both directions, and is taken apart as a whole
        ("1280x2560", 0.5, 20, 16),
    ],
)
def test_a_rotation_needs_little_memory(shape: str, alignment: float, tensors: int, more: int) -> None:
    """Beside its inputs, `tensors` times the memory of one in float32, and `more` MB."""
    size = 4 * math.prod(map(int, shape.split("x")))
    limit = (tensors + 2) * size + (more << 20)  # the C library may hold on to some that are free
    assert least(lambda: printed(SCRIPT, shape, str(alignment)), limit) <= limit


def rotation_by(turns: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A rotation by some angles, in planes drawn at random, in float64."""
    n = 2 * len(turns)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    first, second = basis[:, ::2], basis[:, 1::2]
    within = (first * turns.cos()) @ first.mT + (second * turns.cos()) @ second.mT
    return within + (second * turns.sin()) @ first.mT - (first * turns.sin()) @ second.mT


@pytest.mark.parametrize("power", [0.5, -0.3, 1.7])
@pytest.mark.parametrize(
    "turns",
    [
        torch.linspace(0, 3.1, 90, dtype=torch.float64),
        torch.linspace(0, 1e-3, 90, dtype=torch.float64),
        torch.cat([torch.zeros(40), torch.linspace(3.0, 3.13, 50)]).double(),
    ],
    ids=["all", "small", "near a half turn"],
)
def test_powers_in_single_precision(turns: torch.Tensor, power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rotation_by(turns * power)
    q = rotation_by(turns)
    torch.testing.assert_close(fractional_orthogonal_matrix_power(q, power), expected, atol=1e-11, rtol=0)
    monkeypatch.setattr(angles, "WIDE_UP_TO", 0)
    found = fractional_orthogonal_matrix_power(q.float(), power)
    assert found.dtype == torch.float32
    assert float(torch.linalg.matrix_norm(found - expected, 2)) < 2e-3
    assert float(torch.linalg.matrix_norm(found @ found.mT - torch.eye(len(q)), 2)) < 2e-3


@pytest.mark.parametrize("wide_up_to", [0, 1024])
def test_half_turns_are_halved_in_any_plane_of_theirs(wide_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(angles, "WIDE_UP_TO", wide_up_to)
    q = rotation_by(torch.tensor([math.pi, math.pi, 0.3, 2.0, 0.0]).double()).float()
    root = fractional_orthogonal_matrix_power(q, 0.5)
    torch.testing.assert_close(root @ root, q, atol=1e-5, rtol=0)
