"""The same method through the real engine: the result may depend neither on the budget nor on the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sd_mecha.errors import ContractError
from sd_mecha.extensions.merge_methods import MergeMethod, ParameterData
from sd_mecha.extensions.merge_spaces import MergeSpace, MergeSpaceSymbol
from sd_mecha.extensions.reductions import BLOCK
from sd_mecha.merging import merge
from sd_mecha.recipes.nodes import ModelRecipeNode
from sd_mecha.testing.arguments import KEY, Trial
from sd_mecha.testing.calls import DirectCall, Inputs

PREFERRED = {"weight": 0, "delta": 1, "param": 2}

RUNS: tuple[dict[str, int], ...] = (
    {"threads": 0, "total_buffer_size": 1 << 28},
    {"threads": 0, "total_buffer_size": 1},
    {"threads": 3, "total_buffer_size": 1 << 18},
)


def check_engine(
    method: MergeMethod,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    example: Mapping[str, Any],
    seed: int,
) -> None:
    """Merge with the method under several budgets and numbers of threads and compare the bits.

    Methods of one model config, and those that make no tensor, are left out.

    Raises:
        ContractError: two runs differ, or an input in memory was modified.
    """
    result = method.declaration.result
    configs = [data.model_config for _, data in method.declaration]
    if any(configs) or result.model_config is not None or result.value_type in (int, float, bool, str):
        return
    tiled = method.tiling == "elementwise"
    shape = (3 * BLOCK + 17,) if tiled else max(map(tuple, shapes), key=len, default=(7,))
    for call in Trial(method, shape, dtype, example, seed).calls():
        recipe, space = _recipe(call)
        before = [t.clone() for t in call.tensors()]
        merged = [_merge(recipe, space, dtype, options) for options in RUNS]
        where = f"{shape}, {dtype}" + (f", {dict(example)}" if example else "")
        if not all(torch.equal(old, new) for old, new in zip(before, call.tensors(), strict=True)):
            raise ContractError(f"{method.identifier}: merging modified a model in memory (shape {where})")
        for options, got in zip(RUNS[1:], merged[1:], strict=True):
            for key, expected in merged[0].items():
                if not torch.equal(_bits(got[key]), _bits(expected)):
                    raise ContractError(
                        f"{method.identifier}: merged with {options}, key {key!r} has other bits than with "
                        f"{RUNS[0]} (shape {where})"
                    )


def _merge(recipe: Any, space: str, dtype: torch.dtype, options: Mapping[str, int]) -> dict[str, Tensor]:
    merged = merge(
        recipe,
        merge_dtype=dtype,
        output_dtype=None,
        strict_merge_space=space,
        omit_non_finite_inputs=False,
        check_finite_output=False,
        allow_empty_merge=True,
        **options,
    )
    assert merged is not None
    return {key: tensor for key, tensor in merged.items() if isinstance(tensor, Tensor)}


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, with every NaN alike."""
    if tensor.dtype.is_floating_point:
        tensor = torch.where(torch.isnan(tensor), torch.full_like(tensor, float("nan")), tensor)
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def _recipe(call: DirectCall) -> tuple[Any, str]:
    """A recipe node with the arguments of a call, and the merge space of its result."""
    method = call.method
    declared = method.declaration.parameters
    positional = declared.args_varargs(len(call.args))
    args = [_node(value, data) for value, data in zip(call.args, positional, strict=True)]
    kwargs = {name: _node(value, declared.kwargs[name]) for name, value in call.kwargs.items()}
    return method(*args, **kwargs), _space(method.declaration.result).identifier


def _node(value: Any, data: ParameterData) -> Any:
    """A model in memory for a tensor of the model; a plain value for everything else."""
    if isinstance(value, Inputs):
        return ModelRecipeNode(dict(value), None, _space(data))
    if isinstance(value, Tensor):
        return ModelRecipeNode({KEY: value}, None, _space(data)) if value.dim() else float(value)
    return value


def _space(data: ParameterData) -> MergeSpace:
    """The first merge space, in order of preference, that a declaration allows."""
    space = data.merge_space
    allowed = space.merge_spaces if isinstance(space, MergeSpaceSymbol) else space or frozenset()
    return min(allowed, key=lambda s: PREFERRED.get(s.identifier, len(PREFERRED)))
