"""A row of the table of merge methods: what there is to know about a method, and how to call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import sd_mecha
from sd_mecha.extensions import merge_methods

Nodes = list[Any]


@dataclass(frozen=True)
class Row:
    """What is known about a method."""

    name: str
    """Of a merge method in the registry, or of a recipe in `sd_mecha` that is called like it."""
    takes: str
    """The merge spaces of its inputs, as many as tests give it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    holds: str = ""
    breaks: str = ""
    ends: Sequence[tuple[Mapping[str, Any], int]] = ()
    """Parameters with which the result is one of the inputs bit for bit, and which."""
    returns: str = ""
    """The merge space of the result; that of the first input where it says nothing."""
    variadic: bool = False
    """Whether there may be any number of the last input."""
    based: bool = False
    """Whether the first input is a base, and the method about what the others differ from it by."""
    recipe: bool = False
    """Whether it is a ready-made recipe instead of a merge method."""
    build: Callable[[Nodes, Mapping[str, Any]], Any] | None = None
    """Makes the recipe where calling the method with models and options does not."""
    generic: bool = False
    """Whether laws hold for tensors in general position only, for instance without equal singular values."""
    tolerance: float = 1e-9
    note: str = ""
    """Tells rows of one method apart."""

    def __str__(self) -> str:
        return f"{self.name} {self.note}".strip()

    @property
    def spaces(self) -> tuple[str, ...]:
        return tuple(self.takes.split())

    @property
    def result(self) -> str:
        return self.returns or self.spaces[0]

    @property
    def of_one_kind(self) -> bool:
        """Whether result and inputs can stand in each other's place."""
        return {*self.spaces, self.result} in ({"weight"}, {"delta"})

    def node(self, nodes: Nodes, **options: Any) -> Any:
        """The recipe that applies the method to nodes."""
        options = {**self.options, **options}
        if self.build is not None:
            return self.build(nodes, options)
        method = getattr(sd_mecha, self.name) if self.recipe else merge_methods.resolve(self.name)
        return method(*nodes, **options)

    def recipe_of(self, models: Sequence[Mapping[str, torch.Tensor]], **options: Any) -> Any:
        """The recipe that applies the method to models, given as state dicts."""
        spaces = [*self.spaces, *[self.spaces[-1]] * (len(models) - len(self.spaces))]
        nodes = [sd_mecha.model(dict(m), merge_space=space) for m, space in zip(models, spaces, strict=False)]
        return self.node(nodes, **options)

    def merged(self, models: Sequence[Mapping[str, torch.Tensor]], **options: Any) -> dict[str, torch.Tensor]:
        """What the method makes of models, computed in the dtype of the models."""
        run = {name: options.pop(name) for name in ("threads", "total_buffer_size") if name in options}
        got = sd_mecha.merge(
            self.recipe_of(models, **options),
            strict_merge_space=self.result,
            merge_dtype=None,
            output_dtype=None,
            **{"threads": 0, **run},
        )
        return {key: value for key, value in got.items() if key != "__metadata__"}

    def __call__(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.merged([{"w": tensor} for tensor in tensors], **options)["w"]


W1, W2, W3, W4, W5 = (" ".join(["weight"] * count) for count in (1, 2, 3, 4, 5))
D1, D3 = "delta", "delta delta delta"
SYMMETRIES = "rows columns"
LINEAR = f"shift scale odd zeros {SYMMETRIES}"
"""What every elementwise method that only adds, compares and averages does."""
HOMOGENEOUS = f"scale odd zeros {SYMMETRIES}"
KEPT = f"copies {HOMOGENEOUS}"
IDENTITY = f"copies idempotent {LINEAR}"
TIES = {"k": 1.0}
STOCK = {"cos_eps": 1e-30}
