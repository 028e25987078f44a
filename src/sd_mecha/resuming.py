"""Going on with a merge that was interrupted: what makes it the same merge, and which part of it is left to do."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
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

_DEPTH = 4  # of containers in containers

Finished = Callable[[int, str, int], None]
"""(target, key, bytes) of a result that is complete."""


def fingerprint(planned: Plan, target: int, options: MergeOptions) -> str | None:
    """What an output is made of: recipe, inputs, options and programs, as a short text.

    Merge methods count by name, by their own code and by the plain values that it takes from around it; functions that
    they call, by code alone.

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
    """A digest of what a function, or the methods of a class, are compiled to, and of the plain values they use."""
    functions = [f for _, f in inspect.getmembers(method, inspect.isfunction)] if inspect.isclass(method) else [method]
    facts = [(_compiled(f.__code__), _captured(f)) for f in functions if hasattr(f, "__code__")]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _captured(function: Any) -> list[tuple[str, Any]]:
    """What a function takes from around it: defaults, variables of the function it was made in, globals."""
    code, found = function.__code__, [("defaults", _plain((function.__defaults__, function.__kwdefaults__)))]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            found.append((name, _plain(cell.cell_contents)))
    names = [name for name in _names(code) if name in function.__globals__]
    return [*found, *((name, _plain(function.__globals__[name])) for name in names)]


def _names(code: CodeType) -> list[str]:
    """The names that a function looks up, also those in generators and functions within it."""
    inner = (name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant))
    return list(dict.fromkeys([*code.co_names, *inner]))


def _plain(value: Any, depth: int = 0) -> Any:
    """What tells a plain value from another; of other objects, only their type."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value).__name__, repr(value)
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return content_digest({"": value})
    if isinstance(value, tuple | list) and depth < _DEPTH:
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict) and depth < _DEPTH:
        return [(_plain(key, depth + 1), _plain(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, FunctionType):
        return _compiled(value.__code__)
    return type(value).__qualname__


def _compiled(code: CodeType) -> Any:
    constants = [_compiled(c) if isinstance(c, CodeType) else _stable(c) for c in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames


def _stable(constant: Any) -> str:
    """The text of a constant, which for sets depends on the run."""
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
