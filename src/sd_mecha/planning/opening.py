"""Opening the models of a recipe: one reader for each distinct file or mapping, headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from sd_mecha.errors import MechaError, ModelNotFoundError, PlanError
from sd_mecha.extensions import model_dirs, model_formats
from sd_mecha.recipes.nodes import ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.storage.contract import Reader
from sd_mecha.storage.memory import MemoryReader


@dataclass
class OpenModels:
    """The readers behind a recipe's models. Close it, or use it as a context manager."""

    readers: list[Reader] = field(default_factory=list)
    index: dict[RecipeNode, int] = field(default_factory=dict)  # model node -> its place in `readers`

    def __getitem__(self, node: RecipeNode) -> Reader:
        return self.readers[self.index[node]]

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
        ModelNotFoundError, FileFormatError, UnknownFormatError: the model that cannot be opened; with several such
            models a PlanError that lists them all.
    """
    models = OpenModels()
    by_source: dict[object, int] = {}
    problems: list[MechaError] = []
    for node in toposort(*roots):
        if not isinstance(node, ModelRecipeNode):
            continue
        source: object = id(node.state_dict) if node.state_dict is not None else str(model_dirs.resolve_input(node.path))
        if source not in by_source:
            try:
                reader = _open(node, str(source))
            except MechaError as error:
                problems.append(error)
                continue
            by_source[source] = len(models.readers)
            models.readers.append(reader)
        models.index[node] = by_source[source]
    if problems:
        models.close()
        if len(problems) == 1:
            raise problems[0]
        kinds = {type(p) for p in problems}
        lines = [str(p) for p in problems]
        raise ModelNotFoundError("\n".join(lines)) if kinds == {ModelNotFoundError} else PlanError(lines)
    return models


def _open(node: ModelRecipeNode, resolved: str) -> Reader:
    mapping: Mapping[str, object] | None = node.state_dict
    if mapping is not None:
        return MemoryReader(mapping, "in-memory model")
    return model_formats.find(resolved).reader(Path(resolved))
