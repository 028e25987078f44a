"""Sockets for third parties: merge methods, merge spaces, model configs, model formats, model directories.

Submodules are imported when first used, so that importing this package is free.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "builtin",
    "key_map",
    "merge_methods",
    "merge_spaces",
    "model_configs",
    "model_dirs",
    "model_formats",
    "reductions",
    "registry",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
