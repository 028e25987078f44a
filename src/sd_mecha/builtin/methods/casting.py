"""Asking for, and changing, the dtype and device of tensors within a recipe."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_mecha.errors import OptionError, ParameterError
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.merge_spaces import MergeSpaceSymbol
from sd_mecha.storage.dtypes import dtype_name, parse_dtype


@merge_method(tiling="elementwise", reuse_outputs=False)
def cast(
    a: Parameter(Tensor),
    device: Parameter(str) = None,
    dtype: Parameter(str) = None,
) -> Return(Tensor):
    """Convert a model to a dtype or device; `node.to(dtype=..., device=...)` is this method.

    Formula: `a` rounded to the dtype; integers are truncated towards zero.

    Args:
        a: any model or intermediate result.
        device: a torch device such as "cpu" or "cuda:0"; None keeps it.
        dtype: a torch dtype by name, such as "float16", "bfloat16" or "float8_e4m3fn"; None keeps it.

    Use when: one step needs more precision than `merge_dtype`, or the effect of a storage dtype should be
    included.
    Cost: elementwise, one pass. The result is cast again to `output_dtype` unless that is None.
    Source: none needed.

    >>> import torch
    >>> cast.__wrapped__(torch.tensor([1.5, -2.7]), dtype="int8")
    tensor([ 1, -2], dtype=torch.int8)
    """
    return a.to(device=_device_named(device), dtype=_dtype_named(dtype))


def _device_named(name: str | None) -> torch.device | None:
    try:
        return None if name is None else torch.device(name)
    except RuntimeError:
        raise ParameterError(f"cast: device is {name!r}; expected a device such as 'cpu' or 'cuda:0'") from None


def _dtype_named(name: str | None) -> torch.dtype | None:
    try:
        return parse_dtype(name)
    except OptionError as error:
        raise ParameterError(f"cast: dtype: {error}") from None


@merge_method(tiling="shape", reuse_outputs=False)
def get_dtype(a: Parameter(Tensor, MergeSpaceSymbol())) -> Return(str, "param"):
    """Tell the dtype of each tensor of a model, for use as the `dtype` of `cast`.

    Formula: none; the name as in torch, without the prefix.

    Args:
        a: any model; weights, deltas or parameters. With a `merge_dtype` set, that is the answer.

    Use when: a result should be cast to the dtype that another model has.
    Cost: none; headers suffice.
    Source: none needed.

    >>> import torch
    >>> get_dtype.__wrapped__(torch.zeros(2, dtype=torch.float16))
    'float16'
    """
    return dtype_name(a.dtype)


@merge_method(tiling="shape", reuse_outputs=False)
def get_device(a: Parameter(Tensor, MergeSpaceSymbol())) -> Return(str, "param"):
    """Tell the device of each tensor of a model, for use as the `device` of `cast`.

    Formula: none; the name as in torch.

    Args:
        a: any model; weights, deltas or parameters.

    Use when: a result should be moved to where another model is.
    Cost: none.
    Source: none needed.

    >>> import torch
    >>> get_device.__wrapped__(torch.zeros(2))
    'cpu'
    """
    return str(a.device)
