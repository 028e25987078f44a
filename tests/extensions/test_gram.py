"""The inner products of several tensors: near the exact ones, and the same however the tensors were cut."""

from __future__ import annotations

import pytest
import torch

from sd_mecha.extensions.reductions import BLOCK, Gram


def gram(tensors: list[torch.Tensor], tile: int) -> torch.Tensor:
    numel = tensors[0].numel()
    state = Gram(tensors).state(numel)
    for start in reversed(range(0, numel, tile)):
        state.add(Gram([x.reshape(-1)[start : start + tile] for x in tensors]), start)
    answer = state.finish()
    assert answer is not None
    return answer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, 5 * BLOCK + 77])
def test_inner_products_of_pairs(numel: int, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(numel, generator=generator).to(dtype) for _ in range(count)]
    tensors[-1] = tensors[0]
    found = gram(tensors, numel)
    wide = [x.double() for x in tensors]
    expected = torch.stack([wide[i] @ wide[j] for i in range(count) for j in range(i, count)])
    torch.testing.assert_close(found, expected, atol=1e-5 * numel, rtol=0)
    assert found[0] == found[-1] == found[count - 1]  # of equal tensors they are equal
    for tile in (BLOCK, 2 * BLOCK, 3 * BLOCK):
        assert torch.equal(gram(tensors, tile), found)


def test_a_value_that_is_not_finite_spoils_only_its_own_products() -> None:
    x, y = torch.ones(2 * BLOCK), torch.ones(2 * BLOCK)
    y[5] = float("nan")
    found = gram([x, y], BLOCK)
    assert found[0] == 2 * BLOCK
    assert bool(found[1:].isnan().all())
