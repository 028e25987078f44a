"""Matrix functions under the import path that they had in sd-mecha 1."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "fractional_orthogonal_matrix_power": "orthogonal",
    "stiefel_interpolate": "stiefel",
    "svd_lowrank": "svd",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sd_mecha.builtin.methods.{_WHERE[name]}"), name)
