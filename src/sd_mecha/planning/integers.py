"""Tensors that are no weights: integers, bools and markers are copied bit for bit from the first model.

They go through arithmetic only where the caller or the recipe says so: an integer merge dtype, or a `cast`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sd_mecha.extensions.merge_methods import MergeMethod, Parameter, Return, merge_method
from sd_mecha.planning.bench import Precision
from sd_mecha.planning.markers import is_marker
from sd_mecha.planning.program import Load
from sd_mecha.storage.dtypes import IS_STORAGE_ONLY, is_integral

_logger = logging.getLogger("sd_mecha")


class _KeepFirst:
    """The first of some tensors; a key at which they differ is noted in the log."""

    def __init__(self) -> None:
        self._noted: set[str] = set()

    def __call__(self, *values: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):  # type: ignore[valid-type]
        key = kwargs["key"]
        if key not in self._noted and any(not torch.equal(values[0], other) for other in values[1:]):
            self._noted.add(key)
            _logger.warning("%r is not a weight and differs between inputs: the first one's is taken", key)
        return values[0]


keep_first: MergeMethod = merge_method(identifier="keep_first", register=False, tiling="elementwise")(_KeepFirst)


def copied(loads: Sequence[Load], key: str, merge_dtype: torch.dtype | None, casts: bool) -> bool:
    """Whether the value made from these loads is a fact to be copied rather than a weight to be merged.

    Args:
        loads: what it is made from, literals left out.
        casts: whether the recipe itself decides on a dtype.
    """
    if casts or (merge_dtype is not None and is_integral(merge_dtype)):
        return False
    if is_marker(key):
        return bool(loads)
    return bool(loads) and all(is_integral(load.stored.dtype) for load in loads)


def output_dtype(computed: torch.dtype, precision: Precision, loads: Sequence[Load], casts: bool) -> torch.dtype:
    """The dtype that a merged tensor is written in."""
    if computed.is_complex:
        return computed
    if precision.output_dtype is not None:
        return precision.output_dtype
    stored = {load.stored.dtype for load in loads}
    if precision.merge_dtype is None and len(stored) == 1 and stored <= IS_STORAGE_ONLY and not casts:
        return stored.pop()  # fp8 in, computed in float32, fp8 out
    return computed
