"""What a call returns, and whether it runs on tiles: decided from shapes and dtypes, once for all equal calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sd_mecha.errors import ShapeError
from sd_mecha.extensions.merge_methods import ParameterData
from sd_mecha.extensions.reductions import run_whole
from sd_mecha.planning.arguments import PlannedCall
from sd_mecha.planning.shapes import Result, Spec, run_on_meta
from sd_mecha.planning.tiling import decide
from sd_mecha.storage.contract import TensorEntry

Parameter = tuple[str, ParameterData]


def infer(call: PlannedCall, outputs: tuple[str, ...], parameters: Sequence[Parameter]) -> Result:
    """The specs of a call's results, and how it runs.

    Raises:
        ShapeError: the shapes of its tensors do not fit each other.
    """
    if call.method.tiling == "elementwise" and len(outputs) == 1:
        specs: tuple[Spec, ...] = (_elementwise(call, parameters),)
        assumed = False
    else:
        specs, assumed = run_on_meta(call.on_meta, outputs, call.first_tensor)
    tiled, why = decide(call, specs)
    return Result(specs, tiled, why, assumed)


def _elementwise(call: PlannedCall, parameters: Sequence[Parameter]) -> Spec:
    """The shape follows from the promise; the dtype is read off the result for one element."""
    shapes: dict[tuple[int, ...], None] = {}
    entries: list[TensorEntry] = []
    for arg, (_, data) in zip((*call.args, *call.kwargs.values()), parameters, strict=True):
        found = [call.specs[s] for s in arg.slots] if arg.convert is None else []
        entries += (e for e in found if isinstance(e, TensorEntry))
        if found and isinstance(found[0], TensorEntry) and not _is_param(data):
            shapes[found[0].shape] = None
    if len(shapes) > 1:
        raise ShapeError("the shapes differ")
    result = call.on_sample()
    if hasattr(result, "send"):
        result = run_whole(result, 1)
    if not isinstance(result, torch.Tensor):
        return type(result)
    return TensorEntry(_broadcast(e.shape for e in entries), result.dtype)


def _broadcast(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    out: list[int] = []
    for shape in shapes:
        out = [1] * (len(shape) - len(out)) + out
        for i, size in enumerate(reversed(shape), start=1):
            if out[-i] != size and size != 1:
                if out[-i] != 1:
                    raise ShapeError(f"shape {shape} does not broadcast to {tuple(out)}")
                out[-i] = size
    return tuple(out)


def _is_param(data: ParameterData) -> bool:
    spaces: Any = data.merge_space
    return isinstance(spaces, frozenset) and all(s.identifier == "param" for s in spaces)
