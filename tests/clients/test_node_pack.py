"""The symbols that a graphical node pack, written for 1.1.6, imports and calls: it must run unmodified.

The imports, attributes and argument names here are the client's; they are not to be modernised.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sd_mecha
from sd_mecha import (
    Parameter,
    RecipeNodeOrValue,
    Return,
    StateDict,
    convert,
    deserialize,
    extensions,
    literal,
    merge,
    merge_method,
    model,
    omit_component,
    open_graph,
    pick_component,
    recipe_nodes,
    serialize,
    value_to_node,
)
from sd_mecha.extensions import merge_methods, merge_spaces, model_configs, model_dirs
from sd_mecha.extensions.builtin.merge_methods import (
    add_opposite_mask,
    add_strict_opposite_mask,
    train_difference_mask,
)
from sd_mecha.extensions.merge_methods import MergeMethod
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.recipe_nodes import (
    LiteralRecipeNode,
    MergeRecipeNode,
    ModelRecipeNode,
    RecipeNode,
    RecipeVisitor,
)

T = TypeVar("T")
KEYS = ("model.diffusion_model.input_blocks.0.0.bias", "first_stage_model.quant_conv.bias")


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    """Two small checkpoints in a model directory."""
    for name, value in (("a", 0.0), ("b", 8.0)):
        save_file({key: torch.full((4,), value) for key in KEYS}, tmp_path / f"{name}.safetensors")
    model_dirs.add_path(tmp_path)
    yield tmp_path
    model_dirs.remove_path(tmp_path)


class Bar:
    """The client's progress bar: made with `total=`, a context manager, told with `update()`."""

    made: ClassVar[list["Bar"]] = []

    def __init__(self, *, total: int, **kwargs: Any) -> None:
        self.total = total
        self.count = 0
        self.open = False
        self.made.append(self)

    def __enter__(self) -> "Bar":
        self.open = True
        return self

    def __exit__(self, *args: Any) -> None:
        self.open = False

    def update(self, n: int = 1) -> None:
        assert self.open
        self.count += n


def client_merge(recipe: Any, **options: Any) -> dict[str, Any]:
    given = {
        "fallback_model": None,
        "merge_device": "cpu",
        "merge_dtype": torch.float32,
        "output_device": "cpu",
        "output_dtype": torch.float16,
        "threads": 1,
        "total_buffer_size": 2**28,
        "strict_merge_space": "weight",
        "strict_mandatory_keys": False,
        "check_extra_keys": True,
        "check_finite_output": True,
        "omit_non_finite_inputs": True,
        "memoize_intermediates": True,
        "tqdm": Bar,
        "cache": {},
    }
    return merge(recipe=recipe, **{**given, **options})


# --- models, weighted sum, merger -------------------------------------------------------------------------------------


def test_two_models_and_a_weighted_sum(files: Path) -> None:
    Bar.made.clear()
    method = merge_methods.resolve("weighted_sum")
    recipe = method(model("a.safetensors"), model("b.safetensors"), alpha=0.25)
    merged = client_merge(recipe)
    assert not isinstance(merged["__metadata__"], Tensor)
    tensors = {key: value for key, value in merged.items() if isinstance(value, Tensor)}
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == dict.fromkeys(KEYS, [2.0] * 4)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    (bar,) = Bar.made
    assert (bar.total, bar.count, bar.open) == (2, 2, False)


def test_a_fallback_model(files: Path) -> None:
    merged = client_merge(pick_component(model("b.safetensors"), "vae"), fallback_model=model("a.safetensors"))
    assert {key: merged[key].tolist() for key in KEYS} == {KEYS[0]: [0.0] * 4, KEYS[1]: [8.0] * 4}
    merged = client_merge(omit_component(model("b.safetensors"), "vae") | model("a.safetensors"))
    assert merged[KEYS[1]].tolist() == [0.0] * 4


def test_blocks(files: Path) -> None:
    blocks = LiteralRecipeNode({"IN00": 0.5, "BASE": 1.0}, model_config="sd1-supermerger_blocks", merge_space="param")
    a, b = model("a.safetensors"), model("b.safetensors")
    alpha = convert(blocks, model_configs.resolve("sd1-ldm"))
    merged = client_merge(merge_methods.resolve("weighted_sum")(a, b, alpha))
    assert {key: merged[key].tolist() for key in KEYS} == {KEYS[0]: [4.0] * 4, KEYS[1]: [8.0] * 4}


# --- methods ----------------------------------------------------------------------------------------------------------


def test_every_method_can_be_turned_into_a_node_of_the_tool() -> None:
    for method in merge_methods.get_all():
        assert isinstance(method, MergeMethod)
        assert method.get_identifier() == method.identifier
        names, spaces, defaults = method.get_param_names(), method.get_input_merge_spaces(), method.get_default_args()
        assert isinstance(names.args, list)
        assert isinstance(names.kwargs, dict)
        assert len(spaces.args) == len(names.args)
        assert spaces.kwargs.keys() == names.kwargs.keys()
        assert set(defaults.kwargs) <= set(names.kwargs)
        assert len(defaults.args) <= len(names.args)
        by_position = names.as_dict(0)
        assert all(isinstance(key, int | str) and isinstance(name, str) for key, name in by_position.items())
        for space in [*spaces.args, *spaces.kwargs.values(), *([spaces.vararg] if names.has_varargs() else [])]:
            assert merge_spaces.get_identifiers(space)
        if names.has_varargs():
            assert isinstance(names.vararg, str)


def test_converters_interfaces_and_caches() -> None:
    converters = merge_methods.get_all_converters()
    assert all(isinstance(method, MergeMethod) for method in converters)
    for method in merge_methods.get_all():
        assert method.interface is None or all(candidate[0].identifier for candidate in method.interface.candidates)
        method.create_cache()


def test_spaces_are_listed() -> None:
    assert [space.identifier for space in merge_spaces.get_all()][:3] == ["weight", "delta", "param"]
    assert merge_spaces.get_identifiers(merge_spaces.get_all()[0]) == ["weight"]


def test_model_dirs_are_listed(files: Path) -> None:
    assert files in model_dirs.get_all()


@pytest.mark.parametrize("name", ["sd1-supermerger_blocks", "sdxl-supermerger_blocks"])
def test_block_configs_are_there_when_the_pack_is_imported(name: str) -> None:
    config = model_configs.resolve(name)
    assert config in model_configs.get_all_base()
    assert config not in model_configs.get_all_aux()
    assert config in model_configs.get_all()
    assert isinstance(config, ModelConfig)
    assert {"IN00", "M00", "OUT08"} <= set(config.keys())
    assert all(set(component.keys()) <= set(config.keys()) for component in config.components().values())


@pytest.mark.parametrize("method", [train_difference_mask, add_opposite_mask, add_strict_opposite_mask])
def test_masks_are_called_on_tensors(method: MergeMethod) -> None:
    a, b, c = (torch.tensor(values) for values in ([1.0, 2.0], [3.0, 1.0], [2.0, 2.0]))
    mask = method.__wrapped__(a, b, c, torch.tensor(1.0))
    assert mask.shape == (2,)
    assert torch.isfinite(mask).all()


def test_the_modules_are_attributes() -> None:
    assert extensions.merge_methods is merge_methods
    assert extensions.model_configs is model_configs
    assert recipe_nodes.RecipeNode is RecipeNode
    assert sd_mecha.extensions.builtin.merge_methods.train_difference_mask is train_difference_mask
    assert RecipeNodeOrValue is not None


# --- methods of the pack itself ---------------------------------------------------------------------------------------


@merge_method(register=False)
def pack_plain(a: Parameter(Tensor), b: Parameter(Tensor), **kwargs) -> Return(Tensor):
    assert isinstance(kwargs["key"], str)
    return a + b


@merge_method(register=False, cache_factory=dict)
def pack_cached(a: Parameter(StateDict[Tensor]), **kwargs) -> Return(Tensor):
    cache, key = kwargs["cache"], kwargs["key"]
    if cache is not None and a[key].device.type != "meta":
        cache[key] = cache.get(key, 0) + 1
    return a[key]


@merge_method(register=False)
def pack_generic(a: Parameter(StateDict[T]), **kwargs) -> Return(T):
    return a[kwargs["key"]]


def test_methods_of_the_pack(files: Path) -> None:
    b = model("b.safetensors")
    assert client_merge(pack_plain(b, b))[KEYS[0]].tolist() == [16.0] * 4
    assert client_merge(pack_generic(b))[KEYS[0]].tolist() == [8.0] * 4


def test_a_cache_by_node(files: Path) -> None:
    node = pack_cached(model("b.safetensors"))
    cache = {node: node.create_cache()}
    recipe = merge_methods.resolve("weighted_sum")(model("a.safetensors"), node, alpha=0.5)
    client_merge(recipe, cache=cache)
    client_merge(recipe, cache=cache)
    assert cache[node] == dict.fromkeys(KEYS, 2)


def test_checkpointing_makes_a_cache_for_every_merge_node(files: Path) -> None:
    recipe = merge_methods.resolve("weighted_sum")(model("a.safetensors"), pack_cached(model("b.safetensors")), 0.5)
    cache = {node: node.create_cache() for node in recipe if isinstance(node, MergeRecipeNode)}
    client_merge(recipe, cache=cache)
    assert [c for c in cache.values() if c] == [dict.fromkeys(KEYS, 1)]


# --- nodes ------------------------------------------------------------------------------------------------------------


class Describe(RecipeVisitor):
    """A visitor as the pack has one."""

    def visit_literal(self, node: LiteralRecipeNode) -> str:
        values = node.value_dict
        return str({k: v.accept(self) if isinstance(v, RecipeNode) else v for k, v in values.items()})

    def visit_model(self, node: ModelRecipeNode) -> str:
        return f"model:{node.path}"

    def visit_merge(self, node: MergeRecipeNode) -> str:
        bound = node.bound_args
        assert isinstance(bound, inspect.BoundArguments)
        args = [arg.accept(self) for arg in bound.args]
        args += [f"{name}={arg.accept(self)}" for name, arg in bound.kwargs.items()]
        return f"{node.merge_method.identifier}({', '.join(args)})"


def test_visitors() -> None:
    recipe = pack_plain(model("a.safetensors"), value_to_node(0.5))
    assert recipe.accept(Describe()) == "pack_plain(model:a.safetensors, convert_singleton({'key': 0.5}))"


def test_a_merge_node_from_bound_arguments(files: Path) -> None:
    method = merge_methods.resolve("weighted_sum")
    node = method(model("a.safetensors"), model("b.safetensors"), 0.5)
    again = MergeRecipeNode(node.merge_method, node.bound_args, node.model_config, node.merge_space)
    assert again == node
    assert hash(again) == hash(node)
    other = MergeRecipeNode(node.merge_method, node.bound_args, model_configs.resolve("sd1-ldm"), None)
    assert other != node
    assert client_merge(other)[KEYS[0]].tolist() == [4.0] * 4


def test_nodes_are_values() -> None:
    a = model("a.safetensors")
    assert a.model_config is None
    assert a.merge_space.identifier == "weight"
    assert {a: 1}[model("a.safetensors")] == 1
    assert isinstance(a - a, RecipeNode)
    assert isinstance(a | a, RecipeNode)
    assert literal({"x": 1.0}).value_dict == {"x": 1.0}


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_text(files: Path) -> None:
    recipe = merge_methods.resolve("weighted_sum")(model("a.safetensors"), model("b.safetensors"), 0.5)
    assert deserialize(serialize(recipe, finalize=False)) == recipe
    finalised = deserialize(serialize(recipe))
    assert finalised.model_config is None or finalised.model_config.identifier == "sd1-ldm"
    assert client_merge(finalised)[KEYS[0]].tolist() == [4.0] * 4


def test_the_text_of_blocks_can_be_written() -> None:
    blocks = LiteralRecipeNode({"IN00": 0.5}, model_config="sd1-supermerger_blocks")
    recipe = convert(blocks, "sd1-ldm")
    assert 'merge "convert_sd1_blocks_to_ldm"' in serialize(recipe)


def test_looking_into_a_recipe(files: Path) -> None:
    node = model("a.safetensors", merge_space=None)
    with open_graph(node) as graph:
        candidates = graph.root_candidates(model_config_preference=None, merge_space_preference=None)
        assert model_configs.resolve("sd1-ldm") in list(candidates.model_config)
        assert candidates.merge_space
    with open_graph(node, root_only=True) as graph:
        finalised = graph.finalize_root(
            model_config_preference=[model_configs.resolve("sd1-ldm")],
            merge_space=None,
            merge_space_preference=[merge_spaces.resolve("delta"), merge_spaces.resolve("weight")],
            check_mandatory_keys=False,
            check_extra_keys=False,
        )
    assert (finalised.model_config.identifier, finalised.merge_space.identifier) == ("sd1-ldm", "delta")
    with open_graph(node, solve_model_config=False) as graph:
        assert graph.finalize_root(merge_space="weight", check_mandatory_keys=False).model_config is None
