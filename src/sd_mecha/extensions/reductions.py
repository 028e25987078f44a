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
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from sd_mecha.errors import OptionError
from sd_mecha.extensions.tile import ALIGNMENT

BLOCK = ALIGNMENT
_FEW = 1 << 13  # numbers that are counted where they belong; a table of counts of their own would cost more

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


class Gram(Reduction):
    """The inner products of all pairs of `tensors`, as a float64 vector: sooner than a `Dot` for each pair.

    Pairs are ordered (0, 0), (0, 1), ..., (1, 1), (1, 2), ...
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.answer_shape = (len(tensors) * (len(tensors) + 1) // 2,)

    def products(self) -> Tensor:
        """A row of inner products for each block of the tiles; what is missing in the last block counts as zero."""
        tiles = [_wide(x).reshape(-1) for x in self.tensors]
        n, numel = len(tiles), tiles[0].numel()
        full, rest = divmod(numel, BLOCK)
        # rows of zeros up to a multiple of 4: then each element of the product is made in the same way, so that
        # equal tensors have equal products
        blocks = tiles[0].new_empty((full + (rest > 0), -(-n // 4) * 4, BLOCK))
        blocks[:, n:] = 0
        if rest:
            blocks[full].zero_()
        for i, x in enumerate(tiles):
            blocks[:full, i] = x[: full * BLOCK].view(full, BLOCK)
            if rest:
                blocks[full, i, :rest] = x[full * BLOCK :]
        if not blocks.is_cpu:  # how matrices are multiplied there depends on how many there are
            return torch.cat([(blocks[:, i : i + 1] * blocks[:, i:n]).sum(2) for i in range(n)], 1)
        first, second = torch.triu_indices(n, n)
        return (blocks @ blocks.mT)[:, first, second]

    def state(self, numel: int) -> State:
        return _GramState(self, numel)


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


class _GramState(State):
    def __init__(self, reduction: Gram, numel: int) -> None:
        shape = -(-numel // BLOCK), *reduction.answer_shape
        self.blocks = torch.zeros(shape, dtype=torch.float64, device=reduction.tensors[0].device)

    def add(self, reduction: Gram, start: int) -> None:
        products = reduction.products()
        self.blocks[start // BLOCK : start // BLOCK + len(products)] = products

    def finish(self) -> Tensor:
        return self.blocks.sum(0)


class _RadixState(State):
    """Finds the bit pattern of the answer 16 bits at a time, highest first; magnitudes order as their bits do.

    Zeros are the many that a delta may have: an answer among them is known after the first time.
    """

    def __init__(self, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.k = k
        self.nonzero = torch.zeros((), dtype=torch.int64, device=device)
        self.dtype = dtype
        self.shift = torch.finfo(dtype).bits - 16
        self.prefix = 0
        self.counts = torch.zeros(1 << 16, dtype=torch.int64, device=device)
        self.lock = threading.Lock()

    def add(self, reduction: KthMagnitude, start: int) -> None:
        bits = reduction.x.reshape(-1).to(self.dtype).abs().view(_BITS[self.dtype])
        nonzero: Tensor | int = 0
        above = self.shift + 16
        if above < torch.finfo(self.dtype).bits:
            bits = _with_prefix(bits, above, self.prefix)
            digits = (bits >> self.shift).to(torch.int32).bitwise_and_(0xFFFF)
        else:  # magnitudes have no sign bit: the highest digit has nothing above it
            bits, nonzero = _without_many_zeros(bits)
            digits = bits.bitwise_right_shift_(self.shift) if self.shift else bits
        counts = torch.bincount(digits) if digits.numel() > _FEW else None
        with self.lock:
            self.nonzero += nonzero
            if counts is not None:
                self.counts[: counts.numel()] += counts
            else:
                digits = digits.to(torch.int64)
                self.counts.index_add_(0, digits, torch.ones_like(digits))
            if self.counts.is_cuda:  # every worker has a stream of its own
                torch.cuda.current_stream(self.counts.device).synchronize()

    def finish(self) -> Tensor | None:
        if self.k > int(self.nonzero):
            return torch.zeros((), dtype=self.dtype, device=self.counts.device)
        above = self.counts.flip(0).cumsum(0)  # how many lie in this digit or a higher one
        digit = 0xFFFF - int(torch.searchsorted(above, self.k))
        higher = int(above[0xFFFF - digit] - self.counts[digit])
        self.k -= higher
        self.nonzero -= higher
        self.prefix = self.prefix << 16 | digit
        if self.shift == 0:
            bits = torch.tensor(self.prefix, dtype=torch.int64, device=self.counts.device)
            return bits.to(_BITS[self.dtype]).view(self.dtype)
        self.shift -= 16
        self.counts.zero_()
        return None


def _without_many_zeros(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers, without those that are 0 if most are, and how many are not."""
    nonzero = torch.count_nonzero(bits)
    if bits.is_cpu and 2 * int(nonzero) < bits.numel():  # counting the same digit over and over is slow there
        numbers = bits.numpy()
        bits = torch.from_numpy(numbers.compress(numbers != 0))
    return bits, nonzero


def _with_prefix(bits: Tensor, shift: int, prefix: int) -> Tensor:
    """The numbers that begin with some bits, which few do."""
    if bits.is_cpu:  # by numpy, which takes a fifth of the time
        numbers = bits.numpy()
        return torch.from_numpy(numbers[numbers >> shift == prefix])
    return bits[(bits >> shift) == prefix]


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
