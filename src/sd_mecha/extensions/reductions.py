"""Streamed reductions: statistics of a whole tensor, for methods that see one tile at a time.

A merge method with `tiling="elementwise"` may be a generator. Each `yield` hands the engine one reduction, or a tuple
of them, over the tile; the engine runs every tile up to that point, combines, and starts the tiles again with the
answers known:

    @merge_method(tiling="elementwise")
    def normalised(a: Parameter(Tensor)) -> Return(Tensor):
        square = yield Dot(a, a)
        return a / square.sqrt()

A reduction holds its operands and computes when asked, so nothing is spent on it once the answer is known.

Answers do not depend on tile size or on the number of workers. Sums are taken over fixed blocks of `BLOCK` elements
and the blocks are combined in index order in float64; order statistics are counted, which commutes. The engine cuts
tiles at multiples of `BLOCK` only.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from sd_mecha.errors import OptionError

BLOCK = 4096

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class State(ABC):
    """The combined result so far; shared by all workers on one tensor."""

    @abstractmethod
    def add(self, reduction: Any, start: int) -> None:
        """Take in the tile that begins at element `start`. Thread-safe."""

    @abstractmethod
    def finish(self) -> Tensor | None:
        """The answer, of the reduction's `answer_shape`; None if the tiles must be seen once more."""


class Reduction(ABC):
    """What a streamed method yields."""

    answer_shape: tuple[int, ...] = ()

    @abstractmethod
    def state(self, numel: int) -> State:
        """An empty state for a tensor of `numel` elements."""


class Sum(Reduction):
    """The sum of all elements of `x`, as a 0-d float64 tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def values(self) -> Tensor:
        return _wide(self.x)

    def state(self, numel: int) -> State:
        return _SumState(numel, self.x.device)


class Dot(Sum):
    """The inner product of `x` and `y`, as a 0-d float64 tensor."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x)
        self.y = y

    def values(self) -> Tensor:
        return _wide(self.x) * _wide(self.y)


class KthMagnitude(Reduction):
    """The `k`-th largest of |x|, k counted from 1, as a 0-d tensor of x's dtype: exact, by radix selection.

    Raises:
        OptionError: k is not within 1..numel.
    """

    def __init__(self, x: Tensor, k: int) -> None:
        self.x = x
        self.k = k

    def state(self, numel: int) -> State:
        if not 1 <= self.k <= numel:
            raise OptionError(f"KthMagnitude: k={self.k} is outside 1..{numel}, the number of elements")
        return _RadixState(self.k, self.x.dtype if self.x.dtype in _BITS else torch.float32, self.x.device)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _SumState(State):
    def __init__(self, numel: int, device: torch.device) -> None:
        self.blocks = torch.zeros(-(-numel // BLOCK), dtype=torch.float64, device=device)

    def add(self, reduction: Sum, start: int) -> None:
        x = reduction.values().reshape(-1)
        first, full = start // BLOCK, x.numel() // BLOCK
        if full:
            self.blocks[first : first + full] = x[: full * BLOCK].view(full, BLOCK).sum(1)
        if x.numel() > full * BLOCK:
            self.blocks[first + full] = x[full * BLOCK :].sum()

    def finish(self) -> Tensor:
        return self.blocks.sum()


class _RadixState(State):
    """Finds the bit pattern of the answer 16 bits at a time, highest first; magnitudes order as their bits do."""

    def __init__(self, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.k = k
        self.dtype = dtype
        self.shift = torch.finfo(dtype).bits - 16
        self.prefix = 0
        self.counts = torch.zeros(1 << 16, dtype=torch.int64, device=device)
        self.lock = threading.Lock()

    def add(self, reduction: KthMagnitude, start: int) -> None:
        bits = reduction.x.reshape(-1).to(self.dtype).abs().view(_BITS[self.dtype])
        if self.prefix or self.shift + 16 < torch.finfo(self.dtype).bits:
            bits = bits[(bits >> (self.shift + 16)) == self.prefix]
        digits = (bits >> self.shift).bitwise_and_(0xFFFF) if self.shift else bits.to(torch.int32) & 0xFFFF
        counts = torch.bincount(digits, minlength=1 << 16)
        with self.lock:
            self.counts += counts
            if self.counts.is_cuda:  # every worker has a stream of its own
                torch.cuda.current_stream(self.counts.device).synchronize()

    def finish(self) -> Tensor | None:
        above = self.counts.flip(0).cumsum(0)  # how many lie in this digit or a higher one
        digit = 0xFFFF - int(torch.searchsorted(above, self.k))
        self.k -= int(above[0xFFFF - digit] - self.counts[digit])
        self.prefix = self.prefix << 16 | digit
        if self.shift == 0:
            bits = torch.tensor(self.prefix, dtype=torch.int64, device=self.counts.device)
            return bits.to(_BITS[self.dtype]).view(self.dtype)
        self.shift -= 16
        self.counts.zero_()
        return None


def run_whole(generator: Generator[Any, Any, Any], numel: int) -> Any:
    """Drive a streamed method to its end on tiles that are the whole tensor."""
    answer: Any = None
    try:
        while True:
            request = generator.send(answer)
            answer = _answer_whole(request, numel)
    except StopIteration as stop:
        return stop.value


def _answer_whole(request: Any, numel: int) -> Any:
    reductions, single = as_tuple(request)
    answers = []
    for reduction in reductions:
        state = reduction.state(numel)
        answer: Tensor | None = None
        while answer is None:
            state.add(reduction, 0)
            answer = state.finish()
        answers.append(answer)
    return answers[0] if single else tuple(answers)


def as_tuple(request: Any) -> tuple[tuple[Reduction, ...], bool]:
    """What a method yielded, as a tuple, and whether it was a single reduction."""
    if isinstance(request, Reduction):
        return (request,), True
    if isinstance(request, tuple) and all(isinstance(r, Reduction) for r in request):
        return request, False
    raise TypeError(f"a streamed merge method may yield a reduction or a tuple of them, not {request!r}")
