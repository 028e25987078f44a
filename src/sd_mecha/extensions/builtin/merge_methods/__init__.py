"""Any registered merge method by name, where sd-mecha 1 had the built-in ones.

Kept for code written against sd-mecha 1; new code imports from `sd_mecha`.
"""

from __future__ import annotations

from typing import Any

from sd_mecha.errors import UnknownNameError


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    from sd_mecha.extensions import merge_methods

    try:
        return merge_methods.resolve(name)
    except UnknownNameError as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: {error}") from None
