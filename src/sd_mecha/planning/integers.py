"""Tensors that are no weights: integers, bools and markers are copied bit for bit from the first model.

They go through arithmetic only where the caller or the recipe says so: an integer merge dtype, or a `cast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.planning.markers import is_marker
from sd_mecha.planning.program import Call, Load
from sd_mecha.storage.dtypes import IS_STORAGE_ONLY, is_integral

if TYPE_CHECKING:
    from sd_mecha.planning.bench import Precision
    from sd_mecha.planning.builder import Builder


@merge_method(register=False, tiling="elementwise")
def keep_first(*values: Parameter(Tensor)) -> Return(Tensor):  # type: ignore[valid-type]
    """The first of some tensors."""
    return values[0]


def copied(loads: Sequence[Load], builder: Builder, key: str) -> bool:
    """Whether the value made from these loads is a fact to be copied rather than a weight to be merged."""
    loads = [load for load in loads if load.guard or not load.stored.dtype.is_floating_point]
    if not loads and not is_marker(key):
        return False
    merge_dtype = builder.bench.precision.merge_dtype
    if merge_dtype is not None and is_integral(merge_dtype):
        return False
    if not (is_marker(key) or all(is_integral(load.stored.dtype) for load in loads)):
        return False
    return not casts(builder)


def casts(builder: Builder) -> bool:
    """Whether the recipe itself decides on a dtype."""
    methods = (builder.bench.callables[s.target].method for s in builder.steps if isinstance(s, Call))
    return any(m.identifier == "cast" for m in methods)


def output_dtype(computed: torch.dtype, precision: Precision, loads: Sequence[Load], builder: Builder) -> torch.dtype:
    """The dtype that a merged tensor is written in."""
    if computed.is_complex:
        return computed
    if precision.output_dtype is not None:
        return precision.output_dtype
    stored = {load.stored.dtype for load in loads}
    if precision.merge_dtype is None and len(stored) == 1 and stored <= IS_STORAGE_ONLY and not casts(builder):
        return stored.pop()  # fp8 in, computed in float32, fp8 out
    return computed
