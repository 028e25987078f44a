"""Inputs that leave nothing to divide by: every method gives a defined result, of the right shape and dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.methods import laws
from tests.methods.row import Row
from tests.methods.table import ROWS

SHAPES = (*laws.SHAPES, (0, 3), (9,), (1, 3, 1, 1))

Models = list[dict[str, torch.Tensor]]


def model(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tensor of every shape."""
    generator = torch.Generator().manual_seed(seed)
    return {str(i): torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(SHAPES)}


def scaled(tensors: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return {key: tensor * factor for key, tensor in tensors.items()}


def in_columns(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers, laid out in memory with the first dimension innermost."""
    return {key: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t for key, t in tensors.items()}


KINDS: dict[str, Callable[[int, torch.dtype], Models]] = {
    "equal": lambda count, dtype: [model(0, dtype)] * count,
    "zero": lambda count, dtype: [scaled(model(0, dtype), 0.0)] * count,
    "zero first": lambda count, dtype: [scaled(model(0, dtype), 0.0), *(model(i, dtype) for i in range(1, count))],
    "zero last": lambda count, dtype: [*(model(i, dtype) for i in range(1, count)), scaled(model(0, dtype), 0.0)],
    "parallel": lambda count, dtype: [scaled(model(0, dtype), i + 1) for i in range(count)],
    "opposite": lambda count, dtype: [scaled(model(0, dtype), (-1.0) ** i) for i in range(count)],
    "tiny": lambda count, dtype: [scaled(model(i, dtype), torch.finfo(dtype).tiny / 4) for i in range(count)],
    "strided": lambda count, dtype: [in_columns(model(i, dtype)) for i in range(count)],
    "ordinary": lambda count, dtype: [model(i, dtype) for i in range(count)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_results_are_defined(row: Row, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        models = KINDS[kind](len(row.spaces), dtype)
        check(row, models, row.merged(models), dtype)


@pytest.mark.parametrize("row", [row for row in ROWS if row.variadic], ids=str)
def test_a_single_model_is_enough(row: Row) -> None:
    models = [model(i, torch.float32) for i in range(2 if row.based or row.name == "clamp" else 1)]
    got = row.merged(models)
    check(row, models, got, torch.float32)
    if "copies" in row.holds.split():  # and one bound replaces what it limits
        for key, tensor in models[-1].items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [row for row in ROWS if "order" in row.holds.split() and row.of_one_kind], ids=str)
def test_opposite_models_cancel(row: Row) -> None:
    """Of a method that prefers no model, the result lies in the middle: at zero, or at the base."""
    one = model(0, torch.float32)
    given = [one, scaled(one, -1.0)]
    zero = scaled(one, 0.0)
    for tensor in row.merged([zero, *given] if row.based else given).values():
        assert float(tensor.abs().amax() if tensor.numel() else 0) < 1e-6


def check(row: Row, models: Models, got: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == models[0].keys()
    for key, tensor in got.items():
        shape = models[0][key].shape
        if row.name == "stack":
            shape = (len(models), *shape)
        elif row.name == "get_rank_from_ratio":
            shape = ()
        assert tensor.shape == shape, key
        assert bool(torch.isfinite(tensor).all()), key
        if row.note != "to integers" and row.name != "get_rank_from_ratio":
            assert tensor.dtype == dtype, key
