"""sd-mecha: describe a model merge as a recipe, and merge any number of models in constant memory.

Names are loaded when they are first used, so that `import sd_mecha` is light and the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "2.0.0.dev0"

_METHODS = (
    "adapter_delta",
    "add_cosine_a",
    "add_cosine_b",
    "add_opposite_mask",
    "add_strict_opposite_mask",
    "cast",
    "clamp",
    "crossover",
    "exchange_ema",
    "fallback",
    "geometric_median",
    "geometric_sum",
    "get_device",
    "get_dtype",
    "get_rank_from_ratio",
    "model_stock",
    "multiply_quotient",
    "n_average",
    "omit_component",
    "omit_non_finite",
    "perpendicular_component",
    "pick_component",
    "randperm",
    "rebasin",
    "slerp",
    "stack",
    "subtract",
    "ties_sum",
    "ties_sum_extended",
    "ties_sum_with_dropout",
    "top_k_tensor_sum",
    "train_difference_mask",
    "truncate_rank",
    "weighted_sum",
)
"""Merge methods that are public under their identifiers."""

_WHERE = {
    "apply_adapter": "builtin.methods.adapters",
    "add_difference": "builtin.methods.composed",
    "add_difference_ties": "builtin.methods.composed",
    "add_difference_ties_extended": "builtin.methods.composed",
    "add_perpendicular": "builtin.methods.composed",
    "copy_region": "builtin.methods.copying",
    "n_model_stock": "builtin.methods.composed",
    "tensor_sum": "builtin.methods.copying",
    "rotate": "builtin.methods.composed",
    "add_ties_with_dare": "builtin.methods.composed_dropout",
    "dropout": "builtin.methods.composed_dropout",
    "mix_weights": "builtin.methods.block_weights",
    "weights": "builtin.methods.block_weights",
    "combine_adapters": "adapters.combining",
    "compare_adapter": "adapters.comparing",
    "extract_adapter": "adapters.extraction",
    "resize_adapter": "adapters.combining",
    "convert": "conversion",
    "open_graph": "graph",
    "set_log_level": "logs",
    "Defaults": "merging",
    "merge": "merging",
    "merge_many": "merging",
    "plan": "merging",
    "stream": "merging",
    "deserialize": "serialization",
    "deserialize_path": "serialization",
    "serialize": "serialization",
    "literal": "recipes.building",
    "model": "recipes.building",
    "RecipeNode": "recipes.nodes",
    "methods": "extensions.catalogue",
    "Parameter": "extensions.merge_methods",
    "RecipeNodeOrValue": "extensions.merge_methods",
    "Return": "extensions.merge_methods",
    "StateDict": "extensions.merge_methods",
    "StateDictKeyError": "extensions.merge_methods",
    "merge_method": "extensions.merge_methods",
    "skip_key": "extensions.merge_methods",
    "value_to_node": "extensions.merge_methods",
    "KeyMapBuilder": "extensions.key_map",
    "infer_model_configs": "extensions.model_configs",
    "verify": "verifying",
}
"""Every other public name, and the module that defines it."""

_MODULES = ("errors", "extensions", "keys_map", "recipe_nodes", "serialization", "streaming", "testing")

__all__ = [*_METHODS, *_WHERE, *_MODULES]  # all of them are str

if TYPE_CHECKING:
    from sd_mecha import errors as errors
    from sd_mecha import extensions as extensions
    from sd_mecha import keys_map as keys_map
    from sd_mecha import recipe_nodes as recipe_nodes
    from sd_mecha import serialization as serialization
    from sd_mecha import streaming as streaming
    from sd_mecha import testing as testing
    from sd_mecha.adapters.combining import combine_adapters as combine_adapters
    from sd_mecha.adapters.combining import resize_adapter as resize_adapter
    from sd_mecha.adapters.comparing import compare_adapter as compare_adapter
    from sd_mecha.adapters.extraction import extract_adapter as extract_adapter
    from sd_mecha.builtin.methods.adapters import adapter_delta as adapter_delta
    from sd_mecha.builtin.methods.adapters import apply_adapter as apply_adapter
    from sd_mecha.builtin.methods.block_weights import mix_weights as mix_weights
    from sd_mecha.builtin.methods.block_weights import weights as weights
    from sd_mecha.builtin.methods.bounds import clamp as clamp
    from sd_mecha.builtin.methods.casting import cast as cast
    from sd_mecha.builtin.methods.casting import get_device as get_device
    from sd_mecha.builtin.methods.casting import get_dtype as get_dtype
    from sd_mecha.builtin.methods.composed import add_difference as add_difference
    from sd_mecha.builtin.methods.composed import add_difference_ties as add_difference_ties
    from sd_mecha.builtin.methods.composed import add_difference_ties_extended as add_difference_ties_extended
    from sd_mecha.builtin.methods.composed import add_perpendicular as add_perpendicular
    from sd_mecha.builtin.methods.composed import n_model_stock as n_model_stock
    from sd_mecha.builtin.methods.composed import rotate as rotate
    from sd_mecha.builtin.methods.composed_dropout import add_ties_with_dare as add_ties_with_dare
    from sd_mecha.builtin.methods.composed_dropout import dropout as dropout
    from sd_mecha.builtin.methods.copying import copy_region as copy_region
    from sd_mecha.builtin.methods.copying import tensor_sum as tensor_sum
    from sd_mecha.builtin.methods.cosine import add_cosine_a as add_cosine_a
    from sd_mecha.builtin.methods.cosine import add_cosine_b as add_cosine_b
    from sd_mecha.builtin.methods.dropout import ties_sum_with_dropout as ties_sum_with_dropout
    from sd_mecha.builtin.methods.exchange import exchange_ema as exchange_ema
    from sd_mecha.builtin.methods.fourier import crossover as crossover
    from sd_mecha.builtin.methods.geometric import geometric_sum as geometric_sum
    from sd_mecha.builtin.methods.geometric import multiply_quotient as multiply_quotient
    from sd_mecha.builtin.methods.linear import n_average as n_average
    from sd_mecha.builtin.methods.linear import subtract as subtract
    from sd_mecha.builtin.methods.linear import weighted_sum as weighted_sum
    from sd_mecha.builtin.methods.masks import add_opposite_mask as add_opposite_mask
    from sd_mecha.builtin.methods.masks import add_strict_opposite_mask as add_strict_opposite_mask
    from sd_mecha.builtin.methods.masks import train_difference_mask as train_difference_mask
    from sd_mecha.builtin.methods.median import geometric_median as geometric_median
    from sd_mecha.builtin.methods.permutations import randperm as randperm
    from sd_mecha.builtin.methods.permutations import rebasin as rebasin
    from sd_mecha.builtin.methods.regions import top_k_tensor_sum as top_k_tensor_sum
    from sd_mecha.builtin.methods.select import fallback as fallback
    from sd_mecha.builtin.methods.select import omit_component as omit_component
    from sd_mecha.builtin.methods.select import omit_non_finite as omit_non_finite
    from sd_mecha.builtin.methods.select import pick_component as pick_component
    from sd_mecha.builtin.methods.select import stack as stack
    from sd_mecha.builtin.methods.spherical import perpendicular_component as perpendicular_component
    from sd_mecha.builtin.methods.spherical import slerp as slerp
    from sd_mecha.builtin.methods.stock import model_stock as model_stock
    from sd_mecha.builtin.methods.svd import get_rank_from_ratio as get_rank_from_ratio
    from sd_mecha.builtin.methods.svd import truncate_rank as truncate_rank
    from sd_mecha.builtin.methods.ties import ties_sum as ties_sum
    from sd_mecha.builtin.methods.ties import ties_sum_extended as ties_sum_extended
    from sd_mecha.conversion import convert as convert
    from sd_mecha.extensions.catalogue import methods as methods
    from sd_mecha.extensions.key_map import KeyMapBuilder as KeyMapBuilder
    from sd_mecha.extensions.merge_methods import Parameter as Parameter
    from sd_mecha.extensions.merge_methods import RecipeNodeOrValue as RecipeNodeOrValue
    from sd_mecha.extensions.merge_methods import Return as Return
    from sd_mecha.extensions.merge_methods import StateDict as StateDict
    from sd_mecha.extensions.merge_methods import StateDictKeyError as StateDictKeyError
    from sd_mecha.extensions.merge_methods import merge_method as merge_method
    from sd_mecha.extensions.merge_methods import skip_key as skip_key
    from sd_mecha.extensions.merge_methods import value_to_node as value_to_node
    from sd_mecha.extensions.model_configs import infer_model_configs as infer_model_configs
    from sd_mecha.graph import open_graph as open_graph
    from sd_mecha.logs import set_log_level as set_log_level
    from sd_mecha.merging import Defaults as Defaults
    from sd_mecha.merging import merge as merge
    from sd_mecha.merging import merge_many as merge_many
    from sd_mecha.merging import plan as plan
    from sd_mecha.merging import stream as stream
    from sd_mecha.recipes.building import literal as literal
    from sd_mecha.recipes.building import model as model
    from sd_mecha.recipes.nodes import RecipeNode as RecipeNode
    from sd_mecha.serialization import deserialize as deserialize
    from sd_mecha.serialization import deserialize_path as deserialize_path
    from sd_mecha.serialization import serialize as serialize
    from sd_mecha.verifying import verify as verify


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _METHODS or name in _WHERE:
        methods = importlib.import_module(f"{__name__}.extensions.merge_methods")  # also tells recipes of them
        if name in _METHODS:
            found = methods.resolve(name)
        else:
            found = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
