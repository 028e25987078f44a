"""Model configs through real merges: which one is inferred, aliases, optional keys, keys that a config makes."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sd_mecha
from sd_mecha.errors import ConfigError, PlanError
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.model_configs import INFER, KeyMetadata, LazyModelConfigBase, ModelConfig, ModelConfigImpl
from tests.extensions.support import config, model, numbers, registered, run


def inferred(recipe: Any) -> str:
    with sd_mecha.plan(recipe, strict_merge_space=None) as planned:
        found = planned.finalized().model_config
        assert found is not None
        return str(found.identifier)


KEYS = [f"k{i}" for i in range(10)]


# --- inference --------------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_keys_is_enough() -> None:
    with registered(config("known-test", *KEYS)):
        assert inferred(model(k0=1.0, **{f"other{i}": 1.0 for i in range(9)})) == "known-test"
        assert inferred(model(k0=1.0, **{f"other{i}": 1.0 for i in range(10)})) == "structural"


def test_keys_that_the_config_does_not_know_are_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="sd_mecha")
    with registered(config("known-test", *KEYS)):
        a = model(k0=1.0, k1=2.0, other=3.0, another=4.0)
        assert numbers(a) == {"k0": 1.0, "k1": 2.0}
        (record,) = [r for r in caplog.records if "are left out" in r.getMessage()]
        assert "2 of 4 keys are not in config known-test" in record.getMessage()
        assert "'another'" in record.getMessage()
        caplog.clear()
        run(a, check_extra_keys=False)
        assert not [r for r in caplog.records if "are left out" in r.getMessage()]


def test_the_config_that_leaves_fewest_keys_unknown_wins() -> None:
    with registered(config("worse-test", "k0", "k1"), config("better-test", "k0", "k1", "k2")):
        assert inferred(model(k0=1.0, k1=1.0, k2=1.0, k9=1.0)) == "better-test"


def test_inputs_that_are_merged_decide_together() -> None:
    with registered(config("one-test", "a", "b", "c"), config("two-test", "a", "x", "y")):
        both = sd_mecha.weighted_sum(model(a=1.0, b=1.0), model(a=1.0), alpha=0.5)
        assert inferred(both) == "one-test"
        with pytest.raises(ConfigError, match=r"looks like one-test.*like two-test"):
            inferred(sd_mecha.weighted_sum(model(b=1.0, c=1.0), model(x=1.0, y=1.0), alpha=0.5))


def test_an_explicit_config_decides_for_its_group() -> None:
    with registered(config("one-test", "a", "b"), config("two-test", "a", "b", "c")):
        a, b = model(a=1.0, b=2.0, c=3.0), model("one-test", a=3.0, b=4.0, c=5.0)
        assert numbers(sd_mecha.weighted_sum(a, b, alpha=0.5)) == {"a": 2.0, "b": 3.0}


def test_explicit_configs_that_differ_are_a_contradiction() -> None:
    with registered(config("one-test", "a"), config("two-test", "a")):
        recipe = sd_mecha.weighted_sum(model("one-test", a=1.0), model("two-test", a=1.0), alpha=0.5)
        with pytest.raises(ConfigError, match=r"one-test is declared.*two-test is declared.*convert"):
            run(recipe)


def test_a_method_may_declare_the_config() -> None:
    small = config("small-test", "a", "b")
    with registered(small, config("big-test", "a", "b", "c")):

        @merge_method(register=False)
        def small_only(m: Parameter(Tensor, model_config=small)) -> Return(Tensor, model_config=small):
            return m * 10

        assert numbers(small_only(model(a=1.0, b=2.0, c=3.0))) == {"a": 10.0, "b": 20.0}
        with pytest.raises(ConfigError, match=r"big-test is declared.*small-test is what small_only takes as m"):
            run(small_only(model("big-test", a=1.0)))


def test_without_a_known_config_the_common_keys_are_merged() -> None:
    recipe = sd_mecha.weighted_sum(model(p=1.0, q=2.0), model(q=4.0, r=5.0), alpha=0.5)
    assert numbers(recipe) == {"q": 3.0}
    assert inferred(recipe) == "structural"


def test_infer_insists_on_a_known_config() -> None:
    with pytest.raises(ConfigError, match=r"no known model config fits in-memory model; known are: .*sd1-ldm"):
        run(sd_mecha.model({"p": torch.ones(1)}, INFER))
    with pytest.raises(ConfigError, match="no known model config fits"):
        run(sd_mecha.model({"p": torch.ones(1)}, "infer"))
    with registered(config("known-test", "p")):
        assert inferred(sd_mecha.model({"p": torch.ones(1)}, "infer")) == "known-test"


def test_structural_can_be_asked_for() -> None:
    with registered(config("known-test", "p")):
        a = sd_mecha.model({"p": torch.ones(1), "q": torch.ones(1)}, "structural")
        assert inferred(a) == "structural"
        assert numbers(a) == {"p": [1.0], "q": [1.0]}


def test_a_structural_recipe_in_an_output_merges_again(tmp_path: Path) -> None:
    save_file({"p": torch.ones(2), "q": torch.zeros(2)}, tmp_path / "a.safetensors")
    recipe = sd_mecha.weighted_sum(sd_mecha.model(tmp_path / "a.safetensors"), model(p=[3.0, 3.0]), alpha=0.5)
    assert numbers(recipe) == {"p": [2.0, 2.0]}
    doubled = sd_mecha.n_average(*[sd_mecha.model(tmp_path / "a.safetensors")] * 2)
    text = sd_mecha.serialize(doubled)
    assert 'model_config="structural"' in text
    assert numbers(sd_mecha.deserialize(text)) == {"p": [1.0, 1.0], "q": [0.0, 0.0]}


def test_an_empty_model_fits_any_config() -> None:
    with registered(config("known-test", "a")):
        recipe = sd_mecha.model({}) | model("known-test", a=1.0)
        assert numbers(recipe) == {"a": 1.0}


# --- aliases and optional keys ----------------------------------------------------------------------------------------


ALIASED = ModelConfigImpl(
    "aliased-test",
    {
        "main": {
            "first": KeyMetadata([2], "float32", aliases=["one", "uno"]),
            "second": KeyMetadata([2], "float32"),
            "third": KeyMetadata([2], "float32", optional=True),
        }
    },
)


@pytest.fixture
def _aliased() -> Iterator[None]:
    with registered(ALIASED):
        yield


@pytest.mark.usefixtures("_aliased")
def test_aliases_are_read_and_the_key_of_the_config_is_written(tmp_path: Path) -> None:
    save_file({"uno": torch.tensor([1.0, 2.0]), "second": torch.tensor([3.0, 4.0])}, tmp_path / "a.safetensors")
    b = sd_mecha.model({"first": torch.tensor([3.0, 4.0]), "second": torch.tensor([5.0, 6.0])})
    recipe = sd_mecha.weighted_sum(sd_mecha.model(tmp_path / "a.safetensors"), b, alpha=0.5)
    assert numbers(recipe) == {"first": [2.0, 3.0], "second": [4.0, 5.0]}
    sd_mecha.merge(recipe, output=tmp_path / "out.safetensors", output_dtype=None)
    assert load_file(tmp_path / "out.safetensors").keys() == {"first", "second"}


@pytest.mark.usefixtures("_aliased")
def test_a_key_counts_before_its_aliases() -> None:
    assert numbers(model(one=[9.0, 9.0], first=[1.0, 1.0], second=[2.0, 2.0])) == {
        "first": [1.0, 1.0],
        "second": [2.0, 2.0],
    }


@pytest.mark.usefixtures("_aliased")
def test_aliases_vote() -> None:
    assert inferred(model(uno=[1.0, 1.0])) == "aliased-test"


@pytest.mark.usefixtures("_aliased")
def test_a_missing_optional_key_is_no_error() -> None:
    a = model("aliased-test", first=[1.0, 1.0], second=[1.0, 1.0])
    assert run(a, strict_mandatory_keys=True).keys() == {"first", "second"}
    assert run(model("aliased-test", first=[1.0, 1.0], third=[1.0, 1.0])).keys() == {"first", "third"}


@pytest.mark.usefixtures("_aliased")
def test_a_missing_mandatory_key_is_an_error_where_asked_for() -> None:
    a = model("aliased-test", second=[1.0, 1.0])
    assert run(a).keys() == {"second"}
    with pytest.raises(PlanError, match=r"lacks mandatory key 'first' of aliased-test \(also tried 'one', 'uno'\)"):
        run(a, strict_mandatory_keys=True)


def test_keys_of_the_first_model_are_mandatory_without_a_config() -> None:
    recipe = sd_mecha.weighted_sum(model(p=1.0, q=2.0), model(p=1.0), alpha=0.5)
    assert numbers(recipe) == {"p": 1.0}
    with pytest.raises(PlanError, match="lacks key 'q', which in-memory model has"):
        run(recipe, strict_mandatory_keys=True)


# --- keys that a config makes -----------------------------------------------------------------------------------------

asked: list[tuple[str, str, torch.dtype | None]] = []


def make_bias(cfg: ModelConfig, key: str, device: Any, dtype: torch.dtype | None) -> Tensor | None:
    """Zeros for a bias, nothing for another key."""
    asked.append((cfg.identifier, key, dtype))
    return torch.full((2,), 0.5, dtype=dtype, device=device) if key.endswith("bias") else None


MAKING = ModelConfigImpl(
    "making-test",
    {
        "main": {
            "weight": KeyMetadata([2], "float32"),
            "bias": KeyMetadata([2], "float16", aliases=["b"]),
            "scale": KeyMetadata([2], "float32", optional=True),
        }
    },
    make_bias,
)


@pytest.fixture
def _making() -> Iterator[None]:
    asked.clear()
    with registered(MAKING):
        yield


@pytest.mark.usefixtures("_making")
def test_a_config_makes_a_key_that_a_model_lacks() -> None:
    assert numbers(model(weight=[1.0, 2.0])) == {"weight": [1.0, 2.0], "bias": [0.5, 0.5]}
    assert sorted(asked, key=str) == [
        ("making-test", "bias", torch.float16),
        ("making-test", "scale", torch.float32),
    ]


@pytest.mark.usefixtures("_making")
def test_a_made_key_is_merged_like_any_other(tmp_path: Path) -> None:
    save_file({"weight": torch.tensor([1.0, 2.0])}, tmp_path / "a.safetensors")
    a, b = sd_mecha.model(tmp_path / "a.safetensors"), model(weight=[3.0, 4.0], bias=[1.5, 2.5])
    recipe = sd_mecha.weighted_sum(a, b, alpha=0.5)
    assert numbers(recipe) == {"weight": [2.0, 3.0], "bias": [1.0, 1.5]}
    sd_mecha.merge(recipe, output=tmp_path / "out.safetensors", output_dtype="float32")
    assert load_file(tmp_path / "out.safetensors")["bias"].tolist() == [1.0, 1.5]
    assert numbers(a - b) == {"weight": [-2.0, -2.0], "bias": [-1.0, -2.0]}


@pytest.mark.usefixtures("_making")
def test_a_key_that_is_there_is_not_made() -> None:
    assert numbers(model(weight=[1.0, 2.0], b=[7.0, 8.0])) == {"weight": [1.0, 2.0], "bias": [7.0, 8.0]}
    assert "bias" not in {key for _, key, _ in asked}


@pytest.mark.usefixtures("_making")
def test_a_made_key_is_not_missing() -> None:
    assert run(model("making-test", weight=[1.0, 2.0]), strict_mandatory_keys=True).keys() == {"weight", "bias"}
    with pytest.raises(PlanError, match="lacks mandatory key 'weight'"):
        run(model("making-test", scale=[1.0, 2.0]), strict_mandatory_keys=True)


@pytest.mark.usefixtures("_making")
def test_a_key_is_made_once_for_all_uses_of_a_model() -> None:
    a = model(weight=[1.0, 2.0])
    assert numbers(sd_mecha.n_average(a, a, a)) == {"weight": [1.0, 2.0], "bias": [0.5, 0.5]}
    assert [key for _, key, _ in asked].count("bias") == 1


@pytest.mark.usefixtures("_making")
def test_the_plan_names_what_is_made() -> None:
    with sd_mecha.plan(model(weight=[1.0, 2.0])) as planned:
        assert any("what making-test adds to" in reader.name for reader in planned.readers)


# --- lazy and YAML configs --------------------------------------------------------------------------------------------


class Lazy(LazyModelConfigBase):
    identifier = "lazy-test"
    built = 0

    def create_config(self) -> ModelConfig:
        type(self).built += 1
        return ModelConfigImpl("lazy-test", {"main": {"a": KeyMetadata([1], "float32", ["alpha"])}}, make_bias)


def test_a_lazy_config_is_built_when_it_is_asked_for() -> None:
    lazy = Lazy()
    with registered(lazy):
        assert model_configs.resolve("lazy-test") is lazy
        sd_mecha.model({"a": torch.ones(1)}, "lazy-test")
        assert Lazy.built == 0
        assert numbers(model("lazy-test", alpha=[2.0])) == {"a": [2.0]}
        assert numbers(model(alpha=[2.0])) == {"a": [2.0]}
        assert Lazy.built == 1


YAML = """
identifier: yaml-test
components:
  body:
    w: {shape: [2], dtype: float32, aliases: [weight]}
  head:
    b: {shape: [2], dtype: float16, optional: true}
"""


def test_a_yaml_config_merges(tmp_path: Path) -> None:
    (tmp_path / "yaml-test.yaml").write_text(YAML)
    with registered(model_configs.YamlModelConfig(tmp_path / "yaml-test.yaml")):
        a = model(weight=[1.0, 2.0], b=[3.0, 4.0])
        assert numbers(a) == {"w": [1.0, 2.0], "b": [3.0, 4.0]}
        assert numbers(sd_mecha.pick_component(a, "head")) == {"b": [3.0, 4.0]}
        assert numbers(sd_mecha.omit_component(a, "head")) == {"w": [1.0, 2.0]}
        with pytest.raises(PlanError, match="yaml-test has no component 'tail'; its components are body, head"):
            run(sd_mecha.pick_component(a, "tail"))
