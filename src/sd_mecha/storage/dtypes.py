"""The one table of dtypes: torch's, the safetensors format's, and the names that people type."""

from __future__ import annotations

import difflib
from typing import overload

import torch

from sd_mecha.errors import OptionError

# Name in a safetensors header -> attribute of torch; None where torch has no such dtype at all.
_FORMAT: dict[str, str | None] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F6_E2M3": None,
    "F6_E3M2": None,
    "F4": "float4_e2m1fn_x2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}

FORMAT_NAMES = frozenset(_FORMAT)
"""Every dtype name that the safetensors format knows."""

FROM_SAFETENSORS: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in _FORMAT.items()
    if attribute is not None and hasattr(torch, attribute)  # older torch lacks some of them
}
"""Safetensors name -> torch dtype, for the dtypes that the installed torch has."""

TO_SAFETENSORS: dict[torch.dtype, str] = {dtype: name for name, dtype in FROM_SAFETENSORS.items()}
"""torch dtype -> safetensors name."""

FLOAT4: torch.dtype | None = FROM_SAFETENSORS.get("F4")
"""Two 4-bit values in each byte: one torch element stands for two elements in a file's shape."""

IS_STORAGE_ONLY: frozenset[torch.dtype] = frozenset(
    dtype for name, dtype in FROM_SAFETENSORS.items() if name.startswith(("F8", "F4"))
)
"""Floats that torch can keep but not compute with; arithmetic needs a wider dtype."""


def is_integral(dtype: torch.dtype) -> bool:
    """True for integers and bool, whose values must be copied exactly."""
    return not (dtype.is_floating_point or dtype.is_complex)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> `"float16"`."""
    return str(dtype).removeprefix("torch.")


_SHORT = {
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "float8_e4m3": "float8_e4m3fn",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "byte": "uint8",
}

_BY_NAME: dict[str, torch.dtype] = {
    **{name.lower(): dtype for name, dtype in FROM_SAFETENSORS.items()},
    **{dtype_name(dtype): dtype for dtype in TO_SAFETENSORS},
}
_BY_NAME.update({short: _BY_NAME[name] for short, name in _SHORT.items() if name in _BY_NAME})


@overload
def parse_dtype(value: None) -> None: ...
@overload
def parse_dtype(value: str | torch.dtype) -> torch.dtype: ...
def parse_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that an option names; None stays None ("leave as it is").

    Accepts torch dtypes, their names with or without `torch.`, common short names (`fp16`, `bf16`) and
    safetensors names (`F16`), in any case.

    Raises:
        OptionError: nothing is known under that name, or the value is not a name at all; or torch converts nothing to
            that dtype.
    """
    if value is FLOAT4 and value is not None:
        raise OptionError(f"torch converts nothing to {dtype_name(value)} (F4); choose a dtype of eight bits or more")
    if value is None or isinstance(value, torch.dtype):
        return value
    if not isinstance(value, str):
        raise OptionError(f"a dtype must be a torch.dtype, its name or None, got {type(value).__name__} {value!r}")
    name = value.strip().lower().removeprefix("torch.")
    if name in _BY_NAME:
        return parse_dtype(_BY_NAME[name])
    near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else "expected a name such as 'float16', 'bfloat16' or 'float32'"
    raise OptionError(f"unknown dtype {value!r}; {hint}")
