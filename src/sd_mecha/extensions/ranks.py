"""Where each element of a tensor stands in the order of magnitudes, for methods that see one tile at a time."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sd_mecha.extensions.reductions import Reduction, State

BINS = 1 << 15


class MagnitudeRanks(Reduction):
    """A table from which `rank_of` reads the rank of each element of |x|, as a float64 vector.

    Magnitudes are told apart to 8 significant bits. Elements that agree in them share the middle of their ranks, so
    the mean over all elements is 0.5 exactly.
    """

    answer_shape = (BINS,)

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def state(self, numel: int) -> State:
        return _RankState(self.x.device)


def rank_of(x: Tensor, table: Tensor) -> Tensor:
    """The rank of each element: the share of the tensor that is smaller, and half of what is equal; float32, 0 to 1."""
    return table.to(torch.float32).index_select(0, _bin(x).reshape(-1)).view(x.shape)


def _bin(x: Tensor) -> Tensor:
    """The upper half of the float32 pattern without its sign, which orders as magnitudes do."""
    return x.to(torch.float32).abs().view(torch.int32).bitwise_right_shift_(16)


class _RankState(State):
    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.lock = threading.Lock()

    def add(self, reduction: MagnitudeRanks, start: int) -> None:
        counts = torch.bincount(_bin(reduction.x).reshape(-1), minlength=BINS)
        with self.lock:
            self.counts += counts

    def finish(self) -> Tensor:
        up_to = self.counts.cumsum(0).double()
        return (up_to - self.counts / 2) / up_to[-1:].clamp(min=1)
