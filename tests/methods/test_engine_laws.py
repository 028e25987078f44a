"""What the engine may choose changes no bit of any method: tiles, threads, memory; and it leaves its inputs alone."""

from __future__ import annotations

import pytest
import torch

from tests.execution.support import tiles
from tests.methods.row import Row
from tests.methods.table import ROWS

SHAPES = ((), (0, 3), (1,), (130,), (9, 21), (21, 9), (4, 3, 3, 3), (2, 3, 2, 3, 2))


def models(count: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [
        {str(i): torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(SHAPES)}
        for _ in range(count)
    ]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].shape == tensor.shape
        bits = got[key].contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(bits, tensor.contiguous().reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tiles_and_threads_change_no_bit(row: Row, dtype: torch.dtype) -> None:
    given = models(len(row.spaces), dtype)
    whole = row.merged(given, threads=0)
    with tiles(16, 32):
        assert_same(row.merged(given, threads=0), whole)
        assert_same(row.merged(given, threads=2, total_buffer_size=1), whole)
    assert_same(row.merged(given, threads=2), whole)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_inputs_stay_and_are_not_shared(row: Row) -> None:
    given = models(len(row.spaces), torch.float32)
    before = [{key: tensor.clone() for key, tensor in model.items()} for model in given]
    for options in ({}, *(options for options, _ in row.ends)):
        for tensor in row.merged(given, **options).values():
            tensor.add_(1)
        for model, old in zip(given, before, strict=True):
            assert_same(model, old)
