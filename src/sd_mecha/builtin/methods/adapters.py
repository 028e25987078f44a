"""Adapters on models: what a LoRA, or a file of another kind, changes in the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sd_mecha.builtin.methods import linear
from sd_mecha.extensions.adapter_changes import assemble, find_changes
from sd_mecha.extensions.adapter_pieces import RowsOfChange
from sd_mecha.extensions.merge_methods import (
    MergeMethod,
    Parameter,
    RecipeNodeOrValue,
    Return,
    StateDict,
    merge_method,
    resolve,
    value_to_node,
)
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.extensions.tile import Tile
from sd_mecha.recipes.nodes import ModelRecipeNode, RecipeNode


@merge_method(tiling="pieces")
class adapter_delta:
    """Tell what an adapter changes in a model: for each weight that it adapts, the difference that it makes.

    Formula: by the kind of each module: LoRA `alpha / rank * up @ down`, LoHa, LoKr, DoRA, OFT, BOFT, IA3, GLoRA,
    full differences. Modules of one fused weight each change their own rows.

    Args:
        adapter: an adapter file, by the names of kohya-ss, LyCORIS, PEFT, diffusers or ComfyUI, in any layout that a
            conversion leads to from that of the base.
        base: the model that it is for; read only where a kind needs the weights, as DoRA does.
        strict: whether modules that have no place in the base are an error rather than a warning.

    Use when: the change is wanted itself, to scale it, to combine it with others, or to add it to another model;
        `sd_mecha.apply_adapter` adds it to the base.
    Cost: one product of small matrices per weight, made and added piece by piece for LoRA, LoHa and full differences;
        others see the whole tensor.
    Source: Hu et al., arXiv 2106.09685; Liu et al., arXiv 2402.09353; Yeh et al., arXiv 2309.14859.

    >>> import sd_mecha, torch
    >>> base = sd_mecha.model({"proj.weight": torch.zeros(2, 2), "proj.bias": torch.zeros(2)})
    >>> parts = {"proj.lora_up.weight": torch.ones(2, 1), "proj.lora_down.weight": torch.tensor([[1.0, 2.0]])}
    >>> delta = adapter_delta(sd_mecha.model(parts), base)
    >>> sd_mecha.merge(delta, strict_merge_space="delta", output_dtype=None)["proj.weight"]
    tensor([[1., 2.],
            [1., 2.]])
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        config: ModelConfig = builder.output_config
        source = getattr(builder.input_configs["adapter"], "source", "")
        found = find_changes(builder.adapter.keys(), config, source or "the adapter")
        for key, changes in found.by_key.items():
            needs: Any = builder.adapter.keys[dict.fromkeys(k for change in changes for k in change.parts.values())]
            if base_keys := dict.fromkeys(k for change in changes for k in change.base_keys):
                needs = needs & builder.base.keys[base_keys]
            shape = config.keys()[key].shape
            builder[key] = needs @ (changes, shape)
        builder.report(lambda available: found.left_out(source, config.identifier, lambda key: available("base", key)))

    @staticmethod
    def in_pieces(relation: Any) -> bool:
        changes, shape = relation.meta
        return len(shape) > 1 and all(change.in_rows for change in changes)

    def prepare(self, adapter: StateDict[Tensor], base: StateDict[Tensor], strict: bool, **kwargs: Any) -> RowsOfChange:
        changes, _ = kwargs["key_relation"].meta
        return RowsOfChange(kwargs["key"], changes, kwargs["tile"].shape, adapter)

    def __call__(
        self,
        adapter: Parameter(StateDict[Tensor], "weight", "structural"),
        base: Parameter(StateDict[Tensor], "weight"),
        strict: Parameter(bool) = False,
        **kwargs: Any,
    ) -> Return(Tensor, "delta"):
        tile: Tile | None = kwargs.get("tile")
        if tile is not None:
            return self.prepare(adapter, base, strict, **kwargs)(tile)
        changes, shape = kwargs["key_relation"].meta
        return assemble(kwargs["key"], changes, shape, adapter, base)


def apply_adapter(
    base: RecipeNodeOrValue | os.PathLike[str],
    adapter: RecipeNodeOrValue | os.PathLike[str],
    *,
    alpha: RecipeNodeOrValue = 1.0,
    strict: bool = False,
) -> RecipeNode:
    """Add what an adapter changes to a model; what it does not change stays as it is.

    Args:
        base: the model: a recipe, a path, or a dict of tensors.
        adapter: an adapter of any kind and naming style, given likewise; see `adapter_delta`.
        alpha: how much of the change is added; a number, per key or block, or a mask.
        strict: whether parts of the file that change nothing are an error rather than a warning.

    >>> import sd_mecha, torch
    >>> base = sd_mecha.model({"proj.weight": torch.zeros(2, 2), "proj.bias": torch.ones(2)})
    >>> parts = {"proj.lora_up.weight": torch.ones(2, 1), "proj.lora_down.weight": torch.tensor([[1.0, 2.0]])}
    >>> merged = sd_mecha.merge(apply_adapter(base, parts, alpha=0.5), output_dtype=None)
    >>> merged["proj.weight"], merged["proj.bias"]
    (tensor([[0.5000, 1.0000],
            [0.5000, 1.0000]]), tensor([1., 1.]))
    """
    node = _model(base)
    adapter = _model(adapter)
    delta: MergeMethod = resolve("adapter_delta")
    return linear.add_difference(node, delta(adapter, node, strict), alpha) | node


def _model(given: RecipeNodeOrValue | os.PathLike[str]) -> RecipeNode:
    """What is given as a node; a path or a dict of tensors is a model."""
    if isinstance(given, str | os.PathLike | Mapping):
        return ModelRecipeNode(given, None, "weight")
    return value_to_node(given)
