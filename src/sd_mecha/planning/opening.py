"""Opening the models of a recipe: one reader for each distinct file or mapping, headers only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

import torch

from sd_mecha.errors import MechaError, ModelAccessError, PlanError
from sd_mecha.extensions import model_dirs, model_formats
from sd_mecha.extensions.config_prefix import foreign_prefix
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.recipes.nodes import ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.storage.contract import Reader
from sd_mecha.storage.locations import Location
from sd_mecha.storage.memory import MemoryReader
from sd_mecha.storage.quantised.views import as_floats
from sd_mecha.storage.remote.addresses import shown_path
from sd_mecha.storage.views import RenamedReader

_logger = logging.getLogger("sd_mecha")


@dataclass
class OpenModels:
    """The readers behind a recipe's models. Close it, or use it as a context manager."""

    readers: list[Reader] = field(default_factory=list)
    index: dict[RecipeNode, int] = field(default_factory=dict)  # model node -> its place in `readers`
    locations: dict[int, Location] = field(default_factory=dict)  # where those readers lie that do not lie in memory
    _created: dict[tuple[int, ModelConfig], int | None] = field(default_factory=dict)

    def __getitem__(self, node: RecipeNode) -> Reader:
        return self.readers[self.index[node]]

    def created(self, node: RecipeNode, config: ModelConfig, missing: Iterable[str]) -> int | None:
        """The place in `readers` of what a config makes for keys that a model lacks; None if it makes nothing."""
        memo = self.index[node], config
        if memo not in self._created:
            keys = config.keys()
            made = {key: config.create_missing_key(key, torch.device("cpu"), keys[key].dtype) for key in missing}
            tensors = {key: tensor for key, tensor in made.items() if tensor is not None}
            self._created[memo] = len(self.readers) if tensors else None
            if tensors:
                self.readers.append(MemoryReader(tensors, f"what {config.identifier} adds to {self[node].name}"))
        return self._created[memo]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> OpenModels:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_models(*roots: RecipeNode) -> OpenModels:
    """Open every model below `roots`; a path that several nodes share is opened once.

    Raises:
        ModelNotFoundError, ModelAccessError, FileFormatError, UnknownFormatError: the model that cannot be opened.
            Several such models are listed together, in a PlanError where they fail in different ways.
    """
    models = OpenModels()
    by_source: dict[object, int] = {}
    problems: list[MechaError] = []
    for node in toposort(*roots):
        if not isinstance(node, ModelRecipeNode):
            continue
        try:
            source, where = _source(node)
        except MechaError as error:
            problems.append(error)
            continue
        if source not in by_source:
            try:
                reader = _as_known(_open(node, where))
            except MechaError as error:
                problems.append(error)
                continue
            by_source[source] = len(models.readers)
            if where is not None:
                models.locations[len(models.readers)] = where
            models.readers.append(reader)
        models.index[node] = by_source[source]
    if problems:
        models.close()
        if len(problems) == 1:
            raise problems[0]
        kinds = {type(p) for p in problems}
        lines = [str(p) for p in problems]
        raise PlanError(lines) if len(kinds) > 1 else kinds.pop()("\n".join(lines))
    return models


def _source(node: ModelRecipeNode) -> tuple[object, Location | None]:
    """What tells a model from others, and where it lies."""
    if node.path is None:
        return id(node.memory), None
    with _reporting(node):
        location = model_dirs.locate(node.path)
        return location.name, location


def _open(node: ModelRecipeNode, location: Location | None) -> Reader:
    if location is None:
        assert node.state_dict is not None
        name = f"module {type(node.memory).__name__}" if isinstance(node.memory, torch.nn.Module) else "in-memory model"
        return MemoryReader(node.state_dict, name)
    with _reporting(node):
        return model_formats.open_model(location)


def _as_known(reader: Reader) -> Reader:
    """A model as the rest of planning knows it: floats for quantised matrices, keys without a foreign prefix."""
    reader = as_floats(reader)
    prefix = "" if getattr(reader, "components", ()) else foreign_prefix(reader.entries)
    if not prefix:
        return reader
    names = {name: name[len(prefix) :] for name in reader.entries if name.startswith(prefix)}
    if any(here in reader.entries for here in names.values()):
        return reader
    _logger.info("%s: keys are read without their prefix %r", reader.name, prefix)
    return RenamedReader(reader, names)


@contextmanager
def _reporting(node: ModelRecipeNode) -> Iterator[None]:
    """Say of which model the system spoke, whatever format was looking at it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, MechaError):
            raise
        step = "check its permissions" if isinstance(error, PermissionError) else "check the disk"
        named = shown_path(node.path or "")
        raise ModelAccessError(f"model {named!r} cannot be opened: {error.strerror or error}; {step}") from error
