"""What all programs of a plan are built from: models, analysed recipes, and what was found out so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sd_mecha.extensions.method import MergeMethod, method_of
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.extensions.parameters import ParameterData
from sd_mecha.planning.keys import KeyFacts, KeyMaps, Source
from sd_mecha.planning.opening import OpenModels
from sd_mecha.planning.program import Callee
from sd_mecha.planning.shapes import Result
from sd_mecha.planning.trail import describe, named_children, path_to
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, RecipeNode
from sd_mecha.storage.memory import MemoryReader

Bound = tuple[str, ParameterData, RecipeNode]


@dataclass(frozen=True)
class Precision:
    """Devices and dtypes of a merge; None leaves what is there."""

    merge_device: torch.device | None
    merge_dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    guard: bool  # omit_non_finite_inputs


@dataclass(frozen=True)
class Target:
    """One of the recipes that are merged together, analysed."""

    root: RecipeNode
    configs: Mapping[RecipeNode, ModelConfig]
    facts: KeyFacts


@dataclass
class Workbench:
    """What all templates of a plan share."""

    models: OpenModels
    targets: Sequence[Target]
    precision: Precision
    caches: Mapping[RecipeNode, Any]
    nodes: list[RecipeNode] = field(default_factory=list)
    callables: list[Callee] = field(default_factory=list)
    results: dict[object, Result] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)
    skipped: set[Source] = field(default_factory=set)  # what methods turned out to skip
    origins: dict[RecipeNode, int] = field(default_factory=dict)
    called: dict[object, int] = field(default_factory=dict)
    key_maps: KeyMaps = field(default_factory=KeyMaps)
    instances: dict[RecipeNode, Callable[..., Any]] = field(default_factory=dict)  # of methods that run while planning
    _bound: dict[RecipeNode, tuple[Bound, ...]] = field(default_factory=dict)
    _paths: dict[tuple[RecipeNode, RecipeNode], str] = field(default_factory=dict)

    def origin(self, node: RecipeNode) -> int:
        if node not in self.origins:
            self.origins[node] = len(self.nodes)
            self.nodes.append(node)
        return self.origins[node]

    def callee(self, method: MergeMethod, node: RecipeNode | None = None) -> int:
        token: object = method if node is None else node
        if token not in self.called:
            self.called[token] = len(self.callables)
            cache = None if node is None else self.caches.get(node)
            self.callables.append(Callee(method, cache))
        return self.called[token]

    def instance(self, node: MergeRecipeNode) -> Callable[..., Any] | None:
        """What is called for a node at every key, if its method runs while planning; otherwise None."""
        method = method_of(node)
        if method.tiling == "shape" and node not in self.instances:
            self.instances[node] = method.instantiate()
        return self.instances.get(node)

    def bound(self, node: MergeRecipeNode) -> tuple[Bound, ...]:
        """The arguments of a merge node with the parameters that they are bound to."""
        found = self._bound.get(node)
        if found is None:
            data = method_of(node).declaration.parameters
            declared = [*data.args_varargs(len(node.args)), *(data.kwargs[name] for name in node.kwargs)]
            names = named_children(node)
            found = tuple((name, d, child) for d, (name, child) in zip(declared, names, strict=True))
            self._bound[node] = found
        return found

    def path_to(self, root: RecipeNode, node: RecipeNode) -> str:
        """The way from a root to a node, for messages; searched once, however many keys have the problem."""
        if (root, node) not in self._paths:
            self._paths[root, node] = path_to(root, node)
        return self._paths[root, node]

    def literal_reader(self, node: LiteralRecipeNode) -> int:
        """The tensors of a literal, as one more model."""
        if node not in self.models.index:
            tensors = {k: v for k, v in node.value_dict.items() if isinstance(v, torch.Tensor)}
            self.models.index[node] = len(self.models.readers)
            self.models.readers.append(MemoryReader(tensors, describe(node)))
        return self.models.index[node]
