"""Outputs of a merge: what a user names becomes a writer, and what the result says of itself."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch

from sd_mecha.checksums import CHECKSUMS_KEY, ChecksumWriter, tensors_read
from sd_mecha.errors import OptionError, OutputError, RecipeTypeError
from sd_mecha.extensions import model_dirs, model_formats
from sd_mecha.extensions.model_formats import LocationFormat, ModelFormat, OutputRequest
from sd_mecha.options import MergeOptions
from sd_mecha.planning.plan import Plan
from sd_mecha.recipes.nodes import LiteralRecipeNode, ModelRecipeNode
from sd_mecha.recipes.text import serialize_text
from sd_mecha.recipes.tokens import SUFFIX, quote
from sd_mecha.recipes.walk import toposort
from sd_mecha.resuming import fingerprint
from sd_mecha.storage.contract import Writer
from sd_mecha.storage.disk import reporting
from sd_mecha.storage.dtypes import dtype_name, is_integral
from sd_mecha.storage.locations import Location
from sd_mecha.storage.memory import MemoryWriter
from sd_mecha.storage.modules import ModuleWriter
from sd_mecha.storage.quantised.scaled_fp8 import ScaledWriter
from sd_mecha.storage.remote.addresses import shown_path

_logger = logging.getLogger("sd_mecha")

RECIPE_KEY = "mecha_recipe"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a single slash is left of it where it was made a Path

FOLDER_FORMAT = "huggingface"
"""The format of outputs that are folders, unless another is named."""
PIPELINE_FORMAT = "diffusers"
"""That of those whose first input, or model of the side files, is of that format."""


def open_writer(output: Any, planned: Plan, target: int, options: MergeOptions) -> Writer:
    """The writer of one output of a merge; nothing is created before it is declared.

    Args:
        output: a path, a mutable mapping or a `torch.nn.Module`.
        planned: the plan.
        target: which of its outputs.
        options: those of the merge.

    Raises:
        OptionError: the output is none of these, or an option does not go with it.
        OutputError, UnknownFormatError: no format writes such a path.
    """
    writer = _writer(output, planned, target, options)
    dtype = options.output_dtype
    if isinstance(dtype, torch.dtype) and is_integral(dtype):
        _logger.warning(
            "output_dtype=%s cuts off what lies behind the point, and what is too large comes out as another number; "
            "it is no quantisation", dtype_name(dtype),
        )  # fmt: skip
    if options.checksums:
        writer = ChecksumWriter(writer, tensors_read(planned, target), options.workers())
    return ScaledWriter(writer) if options.scaled_fp8 else writer


def output_metadata(planned: Plan, target: int) -> dict[str, str]:
    """What the first model says of itself, that the tensors are PyTorch's, and the recipe."""
    metadata = {**planned.metadata(target), "format": "pt"}
    metadata.pop(CHECKSUMS_KEY, None)  # those of an input
    try:
        metadata[RECIPE_KEY] = _without_secrets(serialize_text(planned.finalized(target)), planned)
    except RecipeTypeError as error:
        _logger.info("the output does not carry its recipe: %s", error)
        metadata.pop(RECIPE_KEY, None)
    return metadata


def _without_secrets(text: str, planned: Plan) -> str:
    """A recipe to be published: addresses in it lose what grants access to them."""
    paths = {n.path for n in toposort(*planned.roots) if isinstance(n, ModelRecipeNode) and n.path is not None}
    for path in paths:
        if shown_path(path) != path:
            text = text.replace(f"model {quote(path)}", f"model {quote(shown_path(path))}")
    return text


def _writer(output: Any, planned: Plan, target: int, options: MergeOptions) -> Writer:
    if isinstance(output, MutableMapping):
        _refuse_file_options(options)
        return MemoryWriter(output)
    if isinstance(output, torch.nn.Module):
        _refuse_file_options(options)
        if options.scaled_fp8:
            raise OptionError("scaled_fp8: a module has no place for scales; leave it out or merge into a path")
        return ModuleWriter(output, _tensors_in_memory(planned))
    if not isinstance(output, str | os.PathLike):
        expected = "a path, a mutable mapping, a torch module or None"
        raise OptionError(f"output must be {expected}, got a {type(output).__name__}")
    path = Path(model_dirs.resolve_output(output))
    _check_place(os.fspath(output), path)
    size = options.shard_size
    request = OutputRequest(
        shard_size=None if size is None else int(size),
        side_files=None if options.side_files is None else model_dirs.locate(options.side_files),
        resume=fingerprint(planned, target, options) if options.resume else None,
        checksums=options.checksums or None,
        inputs=tuple(_locations(planned, target)),
        scaled=options.scaled_fp8,
    )
    return _format(os.fspath(output), path, options, request).writer_for(path, request)


def _locations(planned: Plan, target: int) -> Iterator[Location]:
    """Where the models of a recipe lie, in its order."""
    models = planned.models
    nodes = (node for node in toposort(planned.roots[target]) if isinstance(node, ModelRecipeNode))
    for index in dict.fromkeys(models.index[node] for node in nodes):
        if index in models.locations:
            yield models.locations[index]


def _check_place(named: str, path: Path) -> None:
    """Refuse names that are surely a mistake, and places that the system tells nothing about."""
    if _ADDRESS.match(named):
        address = shown_path(named if "://" in named else named.replace(":/", "://", 1))
        raise OutputError(f"output {address!r} is an address, and outputs are local: write a file, and copy it there")
    if named.lower().endswith(SUFFIX):
        raise OutputError(
            f"output {named!r} has the name of a recipe, and would take its place; name the model another way, such as "
            f"{named[: -len(SUFFIX)]}.safetensors"
        )
    absent = contextlib.suppress(FileNotFoundError, NotADirectoryError)
    with reporting(str(path), "cannot be created"), absent, os.scandir(path):  # a folder will be looked through
        os.stat(os.path.join(path, os.curdir))


def _format(named: str, path: Path, options: MergeOptions, request: OutputRequest) -> ModelFormat:
    if options.output_format is not None:
        return model_formats.resolve(options.output_format)
    names_a_file = any(known.matches_output(path) for known in model_formats.get_all())
    if named.endswith(("/", os.sep)) or path.is_dir() or (options.shard_size is not None and not names_a_file):
        pipelines = model_formats.resolve(PIPELINE_FORMAT)
        after = request.side_files or next(iter(request.inputs), None)
        is_pipeline = isinstance(pipelines, LocationFormat) and after is not None and pipelines.recognises(after)
        return pipelines if is_pipeline else model_formats.resolve(FOLDER_FORMAT)
    return model_formats.for_output(path)


def _tensors_in_memory(planned: Plan) -> Iterator[torch.Tensor]:
    """The tensors that a merge reads from memory."""
    for node in toposort(*planned.roots):
        found: Iterable[object] = ()
        if isinstance(node, ModelRecipeNode):
            found = (node.state_dict or {}).values()
        elif isinstance(node, LiteralRecipeNode):
            found = node.value_dict.values()
        yield from (value for value in found if isinstance(value, torch.Tensor))


def _refuse_file_options(options: MergeOptions) -> None:
    for name in ("output_format", "shard_size", "side_files", "resume"):
        if getattr(options, name) not in (None, False):
            raise OptionError(f"{name} is for outputs that are files; this one is in memory")
