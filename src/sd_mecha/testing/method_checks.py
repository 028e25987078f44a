"""What a merge method promises, checked: inputs stay, pieces agree with the whole, shapes are as planned.

The method is called directly on random tensors of several shapes and dtypes, and merged by the engine under
several budgets and numbers of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sd_mecha.errors import ContractError
from sd_mecha.extensions.merge_methods import MergeMethod
from sd_mecha.extensions.tile import Tile
from sd_mecha.planning.shapes import run_on_meta
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.testing.arguments import Trial
from sd_mecha.testing.calls import DirectCall
from sd_mecha.testing.engine_checks import check_engine

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0,), (7,), (3, 5), (2, 3, 4), (33, 65))
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_merge_method(
    method: MergeMethod,
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    examples: Sequence[Mapping[str, Any]] = ({},),
    seed: int = 0,
) -> None:
    """Check that a merge method keeps its promises.

    - It modifies no input.
    - Twice the same call gives the same bits.
    - With `tiling="elementwise"` or `"rows"`, pieces give the bits of the whole, and with `"pieces"` those of other
      pieces; with `"select"`, the result
      is one of the inputs; with `"shape"`, other numbers give the same result.
    - Run on torch's meta device, while planning, it gives the shape and dtype that it really returns.
    - Merged by the engine, the bits do not depend on the memory budget or the number of threads.

    Args:
        method: the method, as `@merge_method` made it.
        shapes: shapes of the tensors to try it on; with a model config, the shapes of its keys instead.
        dtypes: dtypes to try it with.
        examples: values for parameters that are no tensors, or have defaults, by name; each is tried in turn.
        seed: of the random numbers.

    Raises:
        ContractError: a promise is broken; the message names method, promise, shape, dtype and what differed.
        ValueError: the method cannot be tried like this: an interface, or a parameter that needs an example.
    """
    if method.interface is not None:
        raise ValueError(f"{method.identifier} is an interface; check its implementations")
    if any(data.model_config for _, data in method.declaration):
        shapes = shapes[:1]  # the config has shapes of its own
    for example in examples:
        for dtype in dtypes:
            for shape in shapes:
                for call in Trial(method, tuple(shape), dtype, example, seed).calls():
                    _Check(call, tuple(shape), dtype, example, seed).run()
            check_engine(method, shapes, dtype, example, seed)


class _Check:
    """The checks of one call."""

    def __init__(
        self,
        call: DirectCall,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        example: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.call = call
        self.method = call.method
        self.trial = shape, dtype, example, seed
        # scalars steer; the tensors proper are those with a dimension, where there are any
        sizes = [(t.dim() > 0, t.numel(), tuple(t.shape)) for t in call.tensors()]
        _, numel, self.shape = max(sizes, default=(False, 0, ()))
        self.whole = Tile(0, numel, numel, self.shape)
        self.where = f"shape {self.shape}, {dtype}" + (f", {dict(example)}" if example else "")

    def run(self) -> None:
        before = [t.clone() for t in self.call.tensors()]
        whole = None if self.method.tiling == "pieces" else self.whole
        result = self.call.run(tile=whole)
        self._unmodified(before, "whole tensors")
        again = self.call.run(tile=whole)
        if not same(result, again):
            self._fail("called twice with the same inputs, it returns different results", result, again)
        self._planned(result)
        if self.method.tiling == "elementwise":
            self._pieces(result, flat=True)
            self._unmodified(before, "tiles")
        elif self.method.tiling == "rows" and len(self.shape) > 1:
            self._pieces(result, flat=False)
            self._unmodified(before, "rows")
        elif self.method.tiling == "pieces":
            self._ranges_of(result)
            self._unmodified(before, "pieces")
        elif self.method.tiling == "select":
            self._selected(result)
        elif self.method.tiling == "shape":
            shape, dtype, example, seed = self.trial
            for other in Trial(self.method, shape, dtype, example, seed + 1).calls():
                if other.relation == self.call.relation and not same(result, other.run(tile=self.whole)):
                    self._fail('declares tiling="shape", but other numbers of that shape give another result')

    def _unmodified(self, before: list[Tensor], what: str) -> None:
        for index, (old, new) in enumerate(zip(before, self.call.tensors(), strict=True)):
            if not same(old, new):
                self._fail(f"it modified its tensor input number {index}, called on {what}", new, old)

    def _planned(self, result: Any) -> None:
        whole = None if self.method.tiling == "pieces" else self.whole
        first = self.call.tensors()[0] if self.call.tensors() else None
        entry = None if first is None else TensorEntry(tuple(first.shape), first.dtype)
        outputs = self.call.relation.outputs
        specs, assumed = run_on_meta(lambda: self.call.open(lambda t: t.to("meta"), whole), outputs, entry)
        for key, spec in zip(outputs, specs, strict=True):
            value = result[key] if isinstance(result, Mapping) else result
            real = TensorEntry(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)
            if spec != real:
                how = "the meta device"
                if assumed:
                    how = "its first input, since it cannot run on the meta device"
                self._fail(f"planning expects {spec}, from {how}, but it returns {real}")

    def _pieces(self, result: Any, flat: bool) -> None:
        if not isinstance(result, Tensor) or tuple(result.shape) != self.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            promise = f'declares tiling="{self.method.tiling}"'
            self._fail(f"{promise}, but returns {got} for inputs of {self.shape}")
        length = self.whole.numel if flat else self.shape[0]
        step = 1 if flat else self.whole.numel // max(length, 1)
        for start, stop in _ranges(length):

            def piece(t: Tensor, start: int = start, stop: int = stop) -> Tensor:
                if tuple(t.shape) != self.shape or t.dim() == 0:
                    return t
                return t.reshape(-1)[start:stop] if flat else t[start:stop]

            tile = Tile(start * step, stop * step, self.whole.numel, self.shape)
            got = self.call.run_tile(piece, tile)
            expected = piece(result)
            if not same(got, expected):
                unit = "elements" if flat else "rows"
                what = f'declares tiling="{self.method.tiling}", but {unit} {start}:{stop} on their own differ'
                self._fail(f"{what} from those of the whole", got, expected)

    def _ranges_of(self, result: Any) -> None:
        if not isinstance(result, Tensor):
            self._fail(f'declares tiling="pieces", but returns a {type(result).__name__}')
        if self.method.in_pieces is not None and not self.method.in_pieces(self.call.relation):
            return
        numel, shape = result.numel(), tuple(result.shape)
        expected = self.call.run(tile=Tile(0, numel, numel, shape)).reshape(-1)
        for start, stop in _ranges(numel):
            got = self.call.run(tile=Tile(start, stop, numel, shape))
            if not same(got, expected[start:stop]):
                what = (
                    f'declares tiling="pieces", but elements {start}:{stop} on their own differ from those of the rest'
                )
                self._fail(what, got, expected[start:stop])

    def _selected(self, result: Any) -> None:
        if not any(same(result, t) for t in self.call.tensors()):
            self._fail('declares tiling="select", but what it returns is none of its inputs')

    def _fail(self, what: str, got: Any = None, expected: Any = None) -> None:
        raise ContractError(f"{self.method.identifier}: {what} ({self.where}){difference(got, expected)}")


def _ranges(length: int) -> Iterator[tuple[int, int]]:
    """The whole, then cuts at uneven places, so that vector units see heads and tails of every length."""
    yield 0, length
    cuts = sorted({0, min(1, length), length // 3, length // 2 + 1 if length > 2 else 0, length})
    yield from itertools.pairwise(cuts)
    for start in range(0, min(length, 40), 13):
        yield start, min(length, start + 13)


def same(a: Any, b: Any) -> bool:
    """Whether two results agree bit for bit; a NaN agrees with every NaN."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not bool(_differs(a, b).any())


def _differs(a: Tensor, b: Tensor) -> Tensor:
    signs = torch.signbit(a) != torch.signbit(b) if a.dtype.is_floating_point else a != a
    return ((a != b) | signs) & ~(torch.isnan(a) & torch.isnan(b))


def difference(got: Any, expected: Any) -> str:
    """Say where two results differ first."""
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        return "" if got is None and expected is None else f": {got!r} instead of {expected!r}"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f": {tuple(got.shape)} {got.dtype} instead of {tuple(expected.shape)} {expected.dtype}"
    places = _differs(got.reshape(-1), expected.reshape(-1)).nonzero()
    index = int(places[0])
    is_, should = got.reshape(-1)[index].item(), expected.reshape(-1)[index].item()
    return f": {len(places)} of {got.numel()} elements differ, number {index} is {is_!r} instead of {should!r}"
