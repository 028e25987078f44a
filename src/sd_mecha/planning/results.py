"""What a call returns, and whether it runs on tiles: decided from shapes and dtypes, once for all equal calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sd_mecha.errors import MechaError, ShapeError, StateDictKeyError
from sd_mecha.extensions.merge_methods import ParameterData
from sd_mecha.extensions.reductions import run_whole
from sd_mecha.planning.arguments import PlannedCall
from sd_mecha.planning.shapes import Result, Spec, run_on_meta, spec_of
from sd_mecha.planning.tiling import decide
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.dtypes import is_integral

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
        specs, assumed = run_on_meta(call.on_meta, outputs, call.first_tensor, call.method.identifier)
    tiled, why = decide(call, specs)
    return Result(specs, tiled, why, assumed)


def _elementwise(call: PlannedCall, parameters: Sequence[Parameter]) -> Spec:
    """The shape follows from the promise; the dtype is read off the result for one element."""
    shapes: dict[tuple[int, ...], None] = {}
    entries: list[TensorEntry] = []
    merged: list[TensorEntry] = []  # those that are no parameters
    for arg, (_, data) in zip((*call.args, *call.kwargs.values()), parameters, strict=True):
        found = [call.specs[s] for s in arg.slots] if arg.convert is None else []
        entries += (e for e in found if isinstance(e, TensorEntry))
        if found and isinstance(found[0], TensorEntry) and not _is_param(data):
            shapes[found[0].shape] = None
            merged += entries[-len(found) :]
    if len(shapes) > 1:
        raise ShapeError("the shapes differ; it takes tensors of one shape")
    try:
        result = call.on_sample()
        if hasattr(result, "send"):
            result = run_whole(result, 1)
        spec = spec_of(result)
    except StateDictKeyError:  # because of the key, or only because of the values of the sample?
        spec = run_on_meta(call.on_meta, (call.key,), call.first_tensor)[0][0]
    except RuntimeError as error:
        if isinstance(error, MechaError) or not all(is_integral(e.dtype) for e in merged):
            raise
        spec = TensorEntry((), torch.float32)  # torch may lack it for integers, which are copied in the end
    if not isinstance(spec, TensorEntry):
        return spec
    return TensorEntry(_broadcast(e.shape for e in entries), spec.dtype)


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
