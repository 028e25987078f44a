"""What these functions take: models and adapters as paths, state dicts or recipes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sd_mecha.errors import AdapterError, RecipeTypeError
from sd_mecha.extensions import model_configs, model_dirs, model_formats
from sd_mecha.extensions.adapters import AdapterKind, AdapterModule, read_modules
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.merging import merge
from sd_mecha.planning.configs import solve_configs
from sd_mecha.planning.opening import open_models
from sd_mecha.recipes.building import model
from sd_mecha.recipes.nodes import ModelRecipeNode, RecipeNode
from sd_mecha.recipes.tokens import SUFFIX
from sd_mecha.serialization import deserialize_path
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import Reader
from sd_mecha.storage.memory import MemoryReader

Source = Any
"""A path of a model or of a `.mecha` recipe, a mapping of keys to tensors, a `torch.nn.Module`, or a recipe."""


def node_of(source: Source, merge_space: str = "weight") -> RecipeNode:
    """The recipe that a source stands for.

    Raises:
        RecipeTypeError: it is none.
    """
    if isinstance(source, RecipeNode):
        return source
    if isinstance(source, str | os.PathLike) and Path(source).suffix == SUFFIX:
        return deserialize_path(source)
    if isinstance(source, str | os.PathLike | Mapping | torch.nn.Module):
        return model(source, merge_space=merge_space)
    raise RecipeTypeError(
        f"got a {type(source).__name__}; expected the path of a model, a mapping of keys to tensors, "
        "a torch module or a recipe"
    )


def config_of(base: Any) -> ModelConfig:
    """The config that a model has, or that is named.

    Args:
        base: a config, the name of one, or a model.

    Raises:
        UnknownNameError: it looks like a name, and no config has it.
    """
    if isinstance(base, ModelConfig):
        return base
    if isinstance(base, str) and not Path(base).suffix:
        return model_configs.resolve(base)
    node = node_of(base)
    with open_models(node) as models:
        return solve_configs(node, models)[node]


class AdapterSource:
    """An adapter whose tensors are read one at a time. Close it, or use it in a `with`.

    Args:
        source: the adapter; a recipe that is more than a model is merged first, into memory.

    Raises:
        AdapterError: it is no adapter, or not well formed.
    """

    def __init__(self, source: Source) -> None:
        self._reader = _reader(source)
        self.name = self._reader.name
        try:
            self.modules, stray = read_modules(self._reader.entries)
        except AdapterError as error:
            self.close()
            raise AdapterError(f"{self.name}: {error}") from error
        if stray or not self.modules:
            self.close()
            shown = ", ".join(map(repr, (stray or ["no key at all"])[:3]))
            raise AdapterError(
                f"{self.name}: {len(stray)} of {len(self._reader.entries)} keys belong to no known kind of adapter, "
                f"such as {shown}; give an adapter file"
            )

    def endings(self) -> str:
        """The style of most endings in the file, as adapter kinds call it; that of kohya-ss where all share them."""
        found = [style for module in self.modules for style in module.styles.values() if style != "common"]
        return max(set(found), key=found.count) if found else "kohya"

    def dtype(self) -> torch.dtype:
        """The dtype of most tensors of the file."""
        found = [entry.dtype for entry in self._reader.entries.values()]
        return max(set(found), key=found.count)

    def parts(self, module: AdapterModule, kind: AdapterKind) -> dict[str, Tensor]:
        """What a kind reads of a module, in float32 or better."""
        return {part: self._tensor(key) for part, key in module.used(kind).items()}

    def close(self) -> None:
        """Let go of the file."""
        self._reader.close()

    def __enter__(self) -> AdapterSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _tensor(self, key: str) -> Tensor:
        entry = self._reader.entries[key]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._reader.read_into(key, 0, byte_view(tensor))
        wide = entry.dtype if entry.dtype.itemsize > 4 else torch.float32  # fp8 promotes with nothing
        return tensor.to(wide)


def _reader(source: Source) -> Reader:
    node = node_of(source)
    if not isinstance(node, ModelRecipeNode):
        merged = merge(node, merge_dtype=torch.float32, output_dtype=None, strict_merge_space=None, tqdm=None)
        assert merged is not None  # without an output it is returned
        return MemoryReader(merged, "merged adapter")
    if node.path is None:
        return MemoryReader(node.state_dict or {}, "in-memory adapter")
    return model_formats.open_model(model_dirs.locate(node.path))
