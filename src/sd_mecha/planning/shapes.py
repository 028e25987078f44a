"""Shapes before bytes: what a merge method returns for inputs of given shapes, found on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sd_mecha.errors import ContractError, MechaError, ShapeError, StateDictKeyError
from sd_mecha.extensions.reductions import as_tuple
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.dtypes import IS_STORAGE_ONLY

Spec = TensorEntry | type
"""A tensor of that shape and dtype, or a Python value of that type."""


@dataclass(frozen=True)
class Result:
    """What a call returns: one spec per output key; how it runs, and whether the specs had to be assumed."""

    specs: tuple[Spec, ...]
    tiled: bool
    why: str
    assumed: bool = False


def hollow(entry: TensorEntry, device: torch.device) -> torch.Tensor:
    """A tensor of that shape, dtype and device without memory of its own."""
    return torch.empty((), dtype=entry.dtype, device=device).expand(entry.shape)


def meta(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def run_on_meta(
    call: Callable[[], Any], outputs: tuple[str, ...], first: Spec | None, name: str = "the method"
) -> tuple[tuple[Spec, ...], bool]:
    """Run `call`, whose tensors are on the meta device; one spec per output key, and whether they are assumed.

    A method that looks at values (`.item()`, numpy) cannot run there; it is then assumed to return a tensor like its
    first input, which the executor checks.

    Raises:
        ShapeError: the shapes of the inputs do not fit the method.
    """
    try:
        result = finish(call())
    except (MechaError, StateDictKeyError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and _is_shape_error(error):
            raise ShapeError(str(error).splitlines()[0]) from error
        if first is None:
            raise
        return (first,) * len(outputs), True
    if isinstance(result, Mapping):
        if absent := [key for key in outputs if key not in result]:
            raise ContractError(f"{name} did not return key {absent[0]!r}, which its key map declares")
        return tuple(spec_of(result[key]) for key in outputs), False
    return (spec_of(result),) * len(outputs), False


_SHAPE_WORDS = ("size", "shape", "dim", "broadcast")


def _is_shape_error(error: RuntimeError) -> bool:
    text = str(error)
    return not isinstance(error, NotImplementedError) and any(word in text for word in _SHAPE_WORDS)


def finish(result: Any) -> Any:
    """The result of a call; a streamed method is given answers without values."""
    if not hasattr(result, "send"):
        return result
    answer: Any = None
    try:
        while True:
            reductions, single = as_tuple(result.send(answer))
            answers = tuple(torch.empty(r.answer_shape, dtype=torch.float64, device="meta") for r in reductions)
            answer = answers[0] if single else answers
    except StopIteration as stop:
        return stop.value


def spec_of(result: Any) -> Spec:
    if isinstance(result, torch.Tensor):
        return TensorEntry(tuple(result.shape), result.dtype)
    return type(result)


def computes(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which arithmetic on values stored as `dtype` is done: fp8 and the like need a wider one."""
    return torch.float32 if dtype in IS_STORAGE_ONLY else dtype
