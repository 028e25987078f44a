"""The functions around `merge` as their callers use them."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sd_mecha
from sd_mecha.errors import ConfigError, MergeSpaceError, PlanError
from sd_mecha.extensions import merge_spaces, model_configs
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method

BIAS = "model.diffusion_model.out.2.bias"
A = {"w": torch.full((2, 3), 1.0), "b": torch.full((3,), 1.0)}
B = {"w": torch.full((2, 3), 3.0), "b": torch.full((3,), 3.0)}


def weighted() -> Any:
    return sd_mecha.weighted_sum(sd_mecha.model(A), sd_mecha.model(B))


# --- merge -----------------------------------------------------------------------------------------------------------


def test_without_an_output_a_new_dict_is_returned() -> None:
    merged = sd_mecha.merge(weighted())
    assert type(merged) is dict
    assert merged.keys() == {"w", "b", "__metadata__"}
    assert merged["w"].dtype == torch.float16
    assert merged["w"].unique().tolist() == [2.0]


def test_a_mapping_is_filled_and_returned() -> None:
    for mapping in ({"kept": 1}, UserDict({"kept": 1})):
        assert sd_mecha.merge(weighted(), output=mapping) is mapping
        assert mapping["kept"] == 1
        assert mapping["b"].tolist() == [2.0] * 3


def test_a_path_is_written_and_none_returned(tmp_path: Path) -> None:
    for path in (tmp_path / "o.safetensors", str(tmp_path / "p.safetensors")):
        assert sd_mecha.merge(weighted(), output=path) is None
        assert load_file(path)["b"].tolist() == [2.0] * 3


def test_a_fallback_fills_what_a_known_config_lacks() -> None:
    other = "model.diffusion_model.out.0.bias"
    one = sd_mecha.model({BIAS: torch.ones(4)}, config="sd1-ldm")
    base = sd_mecha.model({BIAS: torch.zeros(4), other: torch.full((320,), 2.0)}, config="sd1-ldm")
    merged = sd_mecha.merge(one, fallback_model=base)
    assert merged[BIAS].tolist() == [1.0] * 4
    assert merged[other].unique().tolist() == [2.0]


def test_keys_of_one_model_only_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    more = sd_mecha.model({**A, "extra": torch.ones(1)})
    merged = sd_mecha.merge(sd_mecha.n_average(more, sd_mecha.model(B)))
    assert merged.keys() == {"w", "b", "__metadata__"}
    assert "'extra'" in caplog.text
    caplog.clear()
    sd_mecha.merge(sd_mecha.n_average(more, sd_mecha.model(B)), check_extra_keys=False)
    assert "'extra'" not in caplog.text


def test_the_keys_of_the_first_model_are_mandatory_where_that_is_asked_for() -> None:
    more, less = sd_mecha.model({**A, "extra": torch.ones(1)}), sd_mecha.model(B)
    with pytest.raises(PlanError, match=r"lacks key 'extra'"):
        sd_mecha.merge(sd_mecha.n_average(more, less), strict_mandatory_keys=True)
    merged = sd_mecha.merge(sd_mecha.n_average(less, more), strict_mandatory_keys=True)
    assert merged.keys() == {"w", "b", "__metadata__"}


def test_mandatory_keys_of_a_known_config_are_listed() -> None:
    model = sd_mecha.model({BIAS: torch.ones(4)}, config="sd1-ldm")
    with pytest.raises(PlanError, match=r"(?s)lacks mandatory key .* of sd1-ldm.* more"):
        sd_mecha.merge(model, strict_mandatory_keys=True)
    assert sd_mecha.merge(model)[BIAS].tolist() == [1.0] * 4


def test_caches_are_handed_to_the_method_of_their_node() -> None:
    @merge_method(register=False, cache_factory=dict)
    def count(a: Parameter(torch.Tensor), **kwargs: Any) -> Return(torch.Tensor):  # type: ignore[valid-type]
        cache = kwargs["cache"]
        if cache is not None and not a.is_meta:
            cache[kwargs["key"]] = cache.get(kwargs["key"], 0) + 1
        return a

    node = count(sd_mecha.model(A))
    caches = {node: node.create_cache()}
    for _ in range(2):
        sd_mecha.merge(node, cache=caches)
    assert caches == {count(sd_mecha.model(A)): {"w": 2, "b": 2}}
    sd_mecha.merge(node)


class Bar:
    """A progress bar that takes notes."""

    def __init__(self, *, total: int, **kwargs: Any) -> None:
        self.total = total
        self.done = 0
        self.open = False
        bars.append(self)

    def __enter__(self) -> Bar:
        self.open = True
        return self

    def __exit__(self, *args: object) -> None:
        self.open = False

    def update(self, n: int = 1) -> None:
        assert self.open
        self.done += n


bars: list[Bar] = []


@pytest.mark.parametrize("threads", [0, 2])
def test_any_class_with_update_is_a_progress_bar(threads: int) -> None:
    bars.clear()
    sd_mecha.merge(weighted(), tqdm=Bar, threads=threads)
    list(sd_mecha.stream(weighted(), tqdm=Bar, threads=threads))
    assert [(bar.total, bar.done, bar.open) for bar in bars] == [(2, 2, False)] * 2


def test_several_recipes_in_one_pass_are_what_each_is_alone(tmp_path: Path) -> None:
    recipes = {tmp_path / "x.safetensors": weighted(), tmp_path / "y.safetensors": sd_mecha.slerp(*weighted().args[:2])}
    sd_mecha.merge_many(recipes)
    for path, recipe in recipes.items():
        alone = tmp_path / "alone.safetensors"
        sd_mecha.merge(recipe, output=alone)
        assert path.read_bytes() == alone.read_bytes()
    sd_mecha.merge_many({})


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stream_may_be_left_early(threads: int) -> None:
    stream = sd_mecha.stream(sd_mecha.model({f"k{i}": torch.full((3,), float(i)) for i in range(50)}), threads=threads)
    key, tensor = next(stream)
    assert tensor.tolist() == [float(key[1:])] * 3
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


# --- Defaults --------------------------------------------------------------------------------------------------------


def test_defaults_are_used_and_can_be_overruled(tmp_path: Path) -> None:
    defaults = sd_mecha.Defaults(output_dtype=torch.float32, threads=0, strict_merge_space=None)
    assert defaults.merge(weighted())["b"].dtype == torch.float32
    assert defaults.merge(weighted(), output_dtype="bfloat16")["b"].dtype == torch.bfloat16
    assert defaults.merge(sd_mecha.model(A) - sd_mecha.model(B))["b"].tolist() == [-2.0] * 3
    assert "weighted_sum" in str(defaults.plan(weighted()))
    assert sd_mecha.Defaults().merge(weighted())["b"].dtype == torch.float16
    model = sd_mecha.model({BIAS: torch.ones(4)}, config="sd1-ldm")
    assert defaults.convert(model, "sd1-ldm") == model


# --- open_graph, convert ---------------------------------------------------------------------------------------------


def test_a_graph_tells_what_its_root_may_be() -> None:
    model = sd_mecha.model({BIAS: torch.ones(4)}, config="sd1-ldm", merge_space=None)
    with sd_mecha.open_graph(sd_mecha.n_average(model, model), root_only=True) as graph:
        candidates = graph.root_candidates()
        assert [c.identifier for c in candidates.model_config] == ["sd1-ldm"]
        assert {s.identifier for s in candidates.merge_space} >= {"weight", "delta", "param"}
        chosen = graph.root_candidates(merge_space_preference=merge_spaces.get_all()[1:2])
        assert [s.identifier for s in chosen.merge_space] == ["delta"]
        assert not graph.root_candidates(model_config="singleton-mecha").model_config
    with sd_mecha.open_graph(weighted()) as graph:
        assert not graph.root_candidates().model_config
        assert [s.identifier for s in graph.root_candidates().merge_space] == ["weight"]


def test_a_finalised_root_has_everything_filled_in() -> None:
    recipe = sd_mecha.weighted_sum(sd_mecha.model(A, merge_space=None), sd_mecha.model(B, merge_space=None))
    with sd_mecha.open_graph(recipe) as graph:
        done = graph.finalize_root(
            model_config_preference=[model_configs.resolve("singleton-mecha")],
            merge_space_preference=[merge_spaces.resolve("delta"), merge_spaces.resolve("weight")],
            check_mandatory_keys=False,
            check_extra_keys=False,
        )
        assert all(node.model_config is not None and node.merge_space is not None for node in done)
        assert done.merge_space.identifier == "delta"
        assert done.model_config.identifier == "structural"
        assert graph.finalize_root(merge_space="weight").merge_space.identifier == "weight"
    assert recipe.model_config is None
    merged = sd_mecha.merge(done, strict_merge_space="delta")
    assert merged["b"].tolist() == [2.0] * 3


def test_a_graph_refuses_what_its_root_cannot_be() -> None:
    with sd_mecha.open_graph(weighted()) as graph:
        with pytest.raises(MergeSpaceError, match="delta is asked of the result"):
            graph.finalize_root(merge_space="delta")
        with pytest.raises(ConfigError, match="sd1-ldm"):
            graph.finalize_root(model_config="sd1-ldm")
    model = sd_mecha.model({BIAS: torch.ones(4)}, config="sd1-ldm")
    with sd_mecha.open_graph(model) as graph:
        with pytest.raises(PlanError, match="mandatory"):
            graph.finalize_root(check_mandatory_keys=True)
        assert graph.finalize_root(check_mandatory_keys=False) == model


def test_only_what_is_asked_for_is_solved() -> None:
    contradictory = sd_mecha.weighted_sum(sd_mecha.model(A), sd_mecha.model(B, merge_space="delta"))
    with sd_mecha.open_graph(contradictory, solve_merge_space=False) as graph:
        done = graph.finalize_root()
        assert done.model_config is not None
        assert done.merge_space is None


def test_conversion_to_what_a_recipe_has_already_is_the_recipe() -> None:
    model = sd_mecha.model({BIAS: torch.ones(4)}, config="sd1-ldm")
    for target in ("sd1-ldm", model_configs.resolve("sd1-ldm"), model):
        assert sd_mecha.convert(model, target) == model
    blocks = sd_mecha.literal({"OUT11": 0.25}, config="sd1-supermerger_blocks")
    converted = sd_mecha.convert(blocks, model)
    assert converted.merge_method.identifier == "convert_sd1_blocks_to_ldm"
