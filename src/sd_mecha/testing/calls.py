"""Calling a merge method without the engine: on whole tensors, on pieces of them, or on the meta device.

A `DirectCall` holds the arguments of one call. `run` maps every tensor among them first, so that one set of
arguments serves for the whole call, for each tile, and for a call that only asks for shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sd_mecha.extensions.key_map import RealizedKeyRelation
from sd_mecha.extensions.merge_methods import MergeMethod, StateDict
from sd_mecha.extensions.model_configs import ModelConfig, StructuralModelConfig
from sd_mecha.extensions.reductions import run_whole
from sd_mecha.extensions.tile import Tile

TensorMap = Callable[[Tensor], Tensor]


class Inputs(StateDict[Any]):
    """A state dict in memory."""

    def __init__(self, values: Mapping[str, Any], model_config: ModelConfig) -> None:
        self.values_by_key = dict(values)
        self.model_config = model_config

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


@dataclass
class DirectCall:
    """One call of a method: its arguments, and the keys that it is about."""

    method: MergeMethod
    args: list[Any]
    kwargs: dict[str, Any]
    relation: RealizedKeyRelation
    answers: list[Any] = field(default_factory=list)
    """What a streamed method was told in its last run on whole tensors."""

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        found: list[Tensor] = []
        for value in (*self.args, *self.kwargs.values()):
            members = value.values() if isinstance(value, Inputs) else (value,)
            found += [member for member in members if isinstance(member, Tensor)]
        return found

    def run(self, change: TensorMap = lambda t: t, tile: Tile | None = None) -> Any:
        """Call the method on whole tensors, each passed through `change`; drive a streamed one to its end."""
        result = self.open(change, tile)
        if not inspect.isgenerator(result):
            return result
        self.answers.clear()
        return run_whole(self._recorded(result), 0 if tile is None else tile.numel)

    def run_tile(self, change: TensorMap, tile: Tile) -> Any:
        """Call the method on one tile; a streamed one hears the answers of the last run on whole tensors."""
        result = self.open(change, tile)
        if not inspect.isgenerator(result):
            return result
        try:
            next(result)
            for answer in self.answers:
                result.send(answer)
        except StopIteration as stop:
            return stop.value
        raise RuntimeError("the method yields more reductions on a tile than on the whole tensor")

    def open(self, change: TensorMap, tile: Tile | None) -> Any:
        """Call the method; a streamed one is handed back before its first step."""
        context: dict[str, Any] = {}
        if self.method.declaration.accepts_context:
            context = {
                "key": self.relation.outputs[0],
                "key_relation": self.relation,
                "cache": self.method.create_cache(),
                "output_reused": False,
                "tile": tile,
            }
            if self.method.tiling == "shape":
                context["config"] = StructuralModelConfig(self.relation.outputs)
        args = [_changed(value, change) for value in self.args]
        kwargs = {name: _changed(value, change) for name, value in self.kwargs.items()}
        return self.method.instantiate()(*args, **kwargs, **context)

    def _recorded(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        answer: Any = None
        while True:
            try:
                request = generator.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = yield request
            self.answers.append(answer)


def _changed(value: Any, change: TensorMap) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Inputs):
        return Inputs({key: _changed(member, change) for key, member in value.items()}, value.model_config)
    return value
