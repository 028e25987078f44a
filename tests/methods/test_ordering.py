"""Sorting in little memory is sorting."""

from __future__ import annotations

import pytest
import torch

from sd_mecha.builtin.methods.ordering import CHUNK, kth_smallest, order_of, sort_in_place
from tests.memory import least, needs_proc, printed

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 2.0, 2.0, -2.0]

PEAK = """
import threading, time, torch
from pathlib import Path
from sd_mecha.builtin.methods.regions import top_k_tensor_sum

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.001)

done, peaks = False, []
merge = top_k_tensor_sum.__wrapped__
merge(torch.randn(9), torch.randn(9), 0.5)
a, b = torch.randn(4_000_000), torch.randn(4_000_000)
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
merge(a, b, 0.5, 0.25)
done = True
watcher.join()
print((max(peaks) - before) / a.nbytes)
"""


def values(dtype: torch.dtype, count: int) -> torch.Tensor:
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul_(3).round_(decimals=1)  # many are equal
    return torch.cat([drawn, torch.tensor(SPECIAL)])[torch.randperm(count + len(SPECIAL))].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_is_the_order_of_torch(dtype: torch.dtype) -> None:
    x = values(dtype, CHUNK + 1000)
    assert torch.equal(order_of(x).long(), torch.argsort(x, stable=True))
    torch.testing.assert_close(sort_in_place(x.clone()), torch.sort(x).values, rtol=0, atol=0, equal_nan=True)
    finite = x[x.isfinite()]
    ranks = (0, 1, 77, len(finite))
    assert kth_smallest(finite.clone(), *ranks) == [-1.0, *(float(finite.kthvalue(rank).values) for rank in ranks[1:])]


@pytest.mark.slow
@needs_proc
def test_top_k_tensor_sum_needs_four_times_a_tensor() -> None:
    assert least(lambda: printed(PEAK), 4) <= 4
