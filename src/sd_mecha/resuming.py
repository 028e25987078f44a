"""Going on with a merge that was interrupted: what makes it the same merge, and which part of it is left to do."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch

from sd_mecha.options import MergeOptions
from sd_mecha.planning.plan import Plan
from sd_mecha.planning.program import Program
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.storage.contract import Writer
from sd_mecha.storage.memory import content_digest

_logger = logging.getLogger("sd_mecha")

_OPTIONS = (
    "merge_device",
    "merge_dtype",
    "output_dtype",
    "output_format",
    "scaled_fp8",
    "shard_size",
    "omit_non_finite_inputs",
)
"""The options on which the bytes of an output depend."""

Finished = Callable[[int, str, int], None]
"""(target, key, bytes) of a result that is complete."""


def fingerprint(planned: Plan, target: int, options: MergeOptions) -> str | None:
    """What an output is made of: recipe, inputs, options and programs, as a short text.

    Merge methods count by name and by their own code, not by that of functions they call.

    Args:
        planned: the plan.
        target: which of its outputs.
        options: those of the merge.

    Returns:
        The text; None where an input does not tell whether it is still the same, which a warning says.
    """
    inputs = []
    for reader in planned.readers:
        found = getattr(reader, "fingerprint", None)
        if found is None:
            _logger.warning(
                "%s does not tell whether it changed: this merge starts afresh, and keeps nothing", reader.name
            )
            return None
        inputs.append(found)
    facts = [
        _versions(options),
        {name: str(getattr(options, name)) for name in _OPTIONS},
        inputs,
        _recipe(planned, target),
        [[key, list(entry.shape), str(entry.dtype)] for key, entry in planned.outputs[target].items()],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def unfinished(programs: Sequence[Program], writers: Sequence[Writer], finished: Finished) -> Sequence[Program]:
    """The programs that have something left to do; of the others, `finished` is told.

    Args:
        programs: those of a plan.
        writers: the writers of its outputs, which have been declared.
        finished: called for each result that is complete.
    """
    completed = [getattr(writer, "completed", ()) for writer in writers]
    if not any(completed):
        return programs
    left = []
    for program in programs:
        if all(key in completed[target] for target, key, _ in program.outputs):
            for target, key, entry in program.outputs:
                finished(target, key, entry.nbytes)
        else:
            left.append(program)
    return left


def telling(writers: Sequence[Writer], finished: Finished) -> Finished:
    """A function that tells a writer of a finished result before it calls `finished`."""
    told = [getattr(writer, "finished", None) for writer in writers]

    def tell(target: int, key: str, nbytes: int) -> None:
        if (writer := told[target]) is not None:
            writer(key)
        finished(target, key, nbytes)

    return tell


def _versions(options: MergeOptions) -> list[str]:
    device = options.device
    on_gpu = device is not None and device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    try:
        version = importlib.metadata.version("sd_mecha")
    except importlib.metadata.PackageNotFoundError:  # it runs from a folder of sources
        version = ""
    return [version, torch.__version__, hardware]


def _recipe(planned: Plan, target: int) -> list[list[Any]]:
    """A recipe, node by node; text could not hold models in memory."""
    number: dict[bytes, int] = {}
    rows = []
    for node in toposort(planned.roots[target]):
        declared = [None if named is None else named.identifier for named in (node.model_config, node.merge_space)]
        rows.append([*declared, *_content(node, number, planned)])
        number[node.fingerprint] = len(number)
    return rows


def _content(node: RecipeNode, number: dict[bytes, int], planned: Plan) -> list[Any]:
    if isinstance(node, ModelRecipeNode):
        return ["model", planned.models.index.get(node), node.path]
    if isinstance(node, LiteralRecipeNode):
        return ["literal", [[key, _value(value, number)] for key, value in node.value_dict.items()]]
    assert isinstance(node, MergeRecipeNode)
    arguments = [[name, number[child.fingerprint]] for name, child in node.kwargs.items()]
    method = getattr(node.merge_method, "__wrapped__", None)
    positional = [number[child.fingerprint] for child in node.args]
    return ["merge", node.merge_method.identifier, _code(method), positional, arguments]


def _value(value: Any, number: dict[bytes, int]) -> Any:
    if isinstance(value, RecipeNode):
        return number[value.fingerprint]
    if isinstance(value, torch.Tensor):
        return content_digest({"": value})
    return [type(value).__name__, repr(value)]


def _code(method: Any) -> str:
    """A digest of what a function, or the methods of a class, are compiled to."""
    functions = [f for _, f in inspect.getmembers(method, inspect.isfunction)] if inspect.isclass(method) else [method]
    codes = [code for f in functions if (code := getattr(f, "__code__", None)) is not None]
    return hashlib.sha256(repr(list(map(_compiled, codes))).encode()).hexdigest()


def _compiled(code: CodeType) -> Any:
    constants = [_compiled(c) if isinstance(c, CodeType) else _stable(c) for c in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames


def _stable(constant: Any) -> str:
    """The text of a constant, which for sets depends on the run."""
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
