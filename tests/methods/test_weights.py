"""Weights per block, layer type, component and name: which rule gives a key its number, and what it is."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import ParameterError
from sd_mecha.extensions import merge_methods, model_configs
from sd_mecha.extensions.curves import CURVES, preset, sample
from sd_mecha.extensions.model_configs import StructuralModelConfig
from sd_mecha.extensions.weight_rules import apply_rules, read_rules
from sd_mecha.testing import check_merge_method

SD1 = model_configs.resolve("sd1-ldm")
UNET = "model.diffusion_model."
VAE = "first_stage_model.quant_conv.bias"
IN00, M00, OUT00, LAST = (
    UNET + name
    for name in (
        *("input_blocks.0.0.bias", "middle_block.0.in_layers.2.bias"),
        *("output_blocks.0.0.in_layers.2.bias", "out.2.bias"),
    )
)
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def table(*arguments: Any, config: Any = SD1, **options: Any) -> dict[str, float]:
    """What `weights(...)` gives each key."""
    node = sd_mecha.weights(*arguments, **options)
    rules, default = (literal.children[0].value_dict["key"] for literal in node.args[:2])
    return apply_rules(read_rules(rules), default, config).table


def model(value: float, *keys: str) -> Any:
    return sd_mecha.model({key: torch.full((4, 2), value) for key in keys or "abc"})


def layers(count: int, *names: str) -> list[str]:
    return [f"layers.{i}.{name}.weight" for i in range(count) for name in names or ("attn.q_proj", "mlp.up_proj")]


def merged(recipe: Any, **options: Any) -> dict[str, float]:
    result = sd_mecha.merge(recipe, threads=0, output_dtype=None, strict_merge_space=None, **options)
    return {key: round(t.flatten()[0].item(), 6) for key, t in result.items() if key != "__metadata__"}


# --- which rule wins -----------------------------------------------------------------------------------------------


def test_later_rules_win_and_the_default_is_for_the_rest() -> None:
    alpha = sd_mecha.weights({"*": 0.5, "b": 0.25, "[bc]": 0.75}, default=9.0)
    assert merged(sd_mecha.weighted_sum(model(0.0), model(1.0), alpha=alpha)) == {"a": 0.5, "b": 0.75, "c": 0.75}
    alpha = sd_mecha.weights([("[bc]", 0.75), ("b", 0.25)], default=0.125)
    assert merged(sd_mecha.weighted_sum(model(0.0), model(1.0), alpha=alpha)) == {"a": 0.125, "b": 0.25, "c": 0.75}


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("*.input_blocks.0.*", IN00, M00),
        (IN00, IN00, M00),
        ("re:^first_stage", VAE, IN00),
        ("re:(a & b)|middle", M00, IN00),
        ("component:vae", VAE, IN00),
        ("block:input_blocks.0", IN00, M00),
        ("block:IN00", IN00, M00),
        ("block:IN00-05", IN00, M00),
        ("block:OUT00-OUT11", LAST, M00),
        ("block:IN08-OUT00", OUT00, LAST),
        ("block:output_blocks.*", OUT00, LAST),
        ("block:output_blocks.0-3", OUT00, M00),
        ("block:BASE", VAE, IN00),
        ("network", LAST, VAE),
        ("type:embedding", TOKENS, VAE),
        ("network & *.bias", IN00, VAE),
    ],
)
def test_patterns_select_keys(pattern: str, inside: str, outside: str) -> None:
    found = table({pattern: 1.0})
    assert (found[inside], found[outside]) == (1.0, 0.0)


def test_an_alias_stands_for_its_key() -> None:
    alias = "cond_stage_model.transformer.embeddings.token_embedding.weight"
    assert table({alias: 1.0})[TOKENS] == 1.0


def test_attention_stands_for_all_of_its_parts() -> None:
    keys = ["x.attn.to_q.weight", "x.attn.to_out.0.weight", "x.attn.qkv.weight", "x.mlp.fc1.weight"]
    config = StructuralModelConfig(keys)
    assert list(table({"type:attention": 1.0}, config=config).values()) == [1.0, 1.0, 1.0, 0.0]
    assert list(table({"type:attention.q": 1.0}, config=config).values()) == [1.0, 0.0, 0.0, 0.0]


# --- over depth ----------------------------------------------------------------------------------------------------


def test_a_gradient_is_drawn_over_the_blocks_that_the_pattern_selects() -> None:
    config = StructuralModelConfig([*layers(5), "embed.weight"])
    found = table({"*": [0, 1, 0.5]}, default=7.0, config=config)
    assert [found[f"layers.{i}.mlp.up_proj.weight"] for i in range(5)] == [0.0, 0.5, 1.0, 0.75, 0.5]
    assert found["embed.weight"] == 7.0  # in no block
    found = table({"block:layers.1-3": [0, 1]}, config=config)
    assert [found[f"layers.{i}.mlp.up_proj.weight"] for i in range(5)] == [0.0, 0.0, 0.5, 1.0, 0.0]
    found = table({"type:mlp": [1, 0]}, config=config)
    assert [found[f"layers.{i}.mlp.up_proj.weight"] for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert found["layers.0.attn.q_proj.weight"] == 0.0


def test_each_component_has_a_gradient_of_its_own() -> None:
    found = table({"*": "ramp up"})
    ends = "cond_stage_model.transformer.text_model.encoder.layers.{}.mlp.fc1.bias"
    assert [found[ends.format(i)] for i in (0, 11)] == [0.0, 1.0]
    assert [found[IN00], found[M00], found[LAST]] == [0.0, 0.5, 1.0]


def test_a_preset_alone_is_for_the_network_and_a_list_is_one_number_for_each_block() -> None:
    found = table("COSINE", default=0.3)
    assert [found[IN00], found[M00], found[LAST], found[VAE]] == [1.0, 0.5, 0.0, 0.3]
    numbers = [i / 32 for i in range(25)]
    found = table(numbers, default=0.3)
    assert [found[IN00], found[M00], found[LAST], found[VAE]] == [0.0, 12 / 32, 24 / 32, 0.3]
    with_base = table([0.75, *numbers])
    assert [with_base[IN00], with_base[LAST], with_base[VAE]] == [0.0, 24 / 32, 0.75]


def test_26_numbers_agree_with_a_dict_of_block_weights() -> None:
    names = list(model_configs.resolve("sd1-supermerger_blocks").keys())
    numbers = [i / 32 for i in range(26)]
    tensors = {key: SD1.keys()[key].shape for key in (IN00, M00, OUT00, LAST, VAE)}
    a, b = (sd_mecha.model({k: torch.full(s, v) for k, s in tensors.items()}, config="sd1-ldm") for v in (0.0, 1.0))
    old = sd_mecha.convert(sd_mecha.literal(dict(zip(names, numbers, strict=True)), "sd1-supermerger_blocks"), a)
    expected = merged(sd_mecha.weighted_sum(a, b, alpha=old))
    assert merged(sd_mecha.weighted_sum(a, b, alpha=sd_mecha.weights(numbers))) == expected
    assert sorted(expected.values()) == [0.0, 1 / 32, 13 / 32, 14 / 32, 25 / 32]


def test_a_mixture_lies_between_two_curves() -> None:
    config = StructuralModelConfig(layers(3))
    found = table(sd_mecha.mix_weights("GRAD_V", [0, 0, 1], 0.25), config=config)
    assert [found[f"layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.75, 0.0, 1.0]
    nested = sd_mecha.mix_weights(sd_mecha.mix_weights("ALL_A", "ALL_B", 0.5), 1.0, 0.5)
    assert set(table(nested, config=config).values()) == {0.75}


# --- presets -------------------------------------------------------------------------------------------------------

ENDS = {
    **dict.fromkeys(("GRAD_V", "VALLEY"), (1, 0, 1)),
    **dict.fromkeys(("GRAD_A", "HILL", "SMOOTHSTEP*2", "SMOOTHSTEP/2"), (0, 1, 0)),
    **dict.fromkeys(("RAMP_UP", "SMOOTHSTEP", "REVERSE_COSINE", "FAKE_CUBIC_HERMITE"), (0, 0.5, 1)),
    **dict.fromkeys(("SMOOTHSTEP*3", "SMOOTHSTEP/3"), (0, 0.5, 1)),
    **dict.fromkeys(("RAMP_DOWN", "REVERSE-SMOOTHSTEP", "COSINE"), (1, 0.5, 0)),
    **dict.fromkeys(("SMOOTHSTEP*4", "SMOOTHSTEP/4", "ALL_A", "RING08_5", "RING10_3"), (0, 0, 0)),
    **dict.fromkeys(("WRAP08", "WRAP12", "WRAP14", "WRAP16"), (1, 0, 1)),
    "TRUE_CUBIC_HERMITE": (0, 25 / 48, 1),
    "FLAT_25": (0.25, 0.25, 0.25),
    "FLAT_75": (0.75, 0.75, 0.75),
    "ALL_B": (1, 1, 1),
    "MID12_50": (0, 0.5, 0),
    "OUT07": (0, 0, 1),
    "OUT12": (0, 0, 1),
    "OUT12_5": (0, 0.5, 1),
}


@pytest.mark.parametrize("name", ENDS)
def test_presets_begin_turn_and_end_where_they_should(name: str) -> None:
    values = sample(preset(name), 25)
    assert (values[0], values[12], values[24]) == pytest.approx(ENDS[name], abs=1e-12)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("count", [1, 2, 19, 25, 57])
def test_presets_stay_in_range_for_any_number_of_blocks(name: str, count: int) -> None:
    values = sample(preset(name), count)
    assert len(values) == count
    assert all(0.0 <= value <= 1.0 for value in values)


def test_reverses_are_reverses() -> None:
    pairs = {name: name.replace("REVERSE-", "").replace("REVERSE_", "").removeprefix("R_") for name in CURVES}
    reverses = {name: base for name, base in pairs.items() if name != base}
    assert len(reverses) == 10
    for name, base in reverses.items():
        ups, downs = sample(CURVES[base], 25), sample(CURVES[name], 25)
        assert [a + b for a, b in zip(ups, downs, strict=True)] == pytest.approx([1.0] * 25)


@pytest.mark.parametrize("name", ["GRAD_V", "WRAP08", "WRAP14", "MID12_50", "RING08_SOFT", "RING10_5", "RING10_3"])
def test_some_presets_are_symmetric(name: str) -> None:
    values = sample(CURVES[name], 25)
    assert values == pytest.approx(values[::-1])


@pytest.mark.parametrize(
    ("name", "total"),
    [
        *(("WRAP08", 8), ("WRAP12", 12), ("WRAP14", 14), ("WRAP16", 16), ("MID12_50", 6), ("OUT07", 7), ("OUT12", 12)),
        *(("OUT12_5", 12.5), ("RING08_SOFT", 8), ("RING08_5", 8), ("RING10_5", 10), ("RING10_3", 10)),
    ],
)
def test_the_number_in_a_name_counts_its_blocks(name: str, total: float) -> None:
    assert sum(sample(CURVES[name], 25)) == total


def test_cosine_and_smoothstep_are_what_they_say() -> None:
    t = 7 / 24
    assert preset("cosine")(t) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * t))
    assert preset("Smoothstep")(t) == pytest.approx(3 * t**2 - 2 * t**3)
    assert preset("reverse smoothstep")(t) == preset("REVERSE_SMOOTHSTEP")(t) == preset("REVERSE-SMOOTHSTEP")(t)


# --- recipes -------------------------------------------------------------------------------------------------------


def test_it_survives_text() -> None:
    rules = {"*": 0.5, 're:"q"|é\\.': [0, 1e-7], "type:norm": sd_mecha.mix_weights("GRAD_V", "COSINE", 0.3), "a": 2}
    node = sd_mecha.weights(rules, default=0.1, strict=True)
    text = sd_mecha.serialize(node)
    again = sd_mecha.deserialize(text)
    assert sd_mecha.serialize(again) == text
    assert [arg.children[0].value_dict for arg in again.args] == [arg.children[0].value_dict for arg in node.args]
    assert json.loads(again.args[0].children[0].value_dict["key"])[3] == ["a", 2]


def test_equal_rules_make_equal_nodes() -> None:
    assert sd_mecha.weights({"a": 1, "b": 0.5}) == sd_mecha.weights([("a", 1), ("b", 0.5)])
    assert sd_mecha.weights({"a": 1, "b": 0.5}) != sd_mecha.weights({"b": 0.5, "a": 1})  # the order matters


def test_several_weights_in_one_recipe() -> None:
    a, b, c = model(1.0), model(2.0), model(4.0)
    difference = sd_mecha.add_difference(a, b, c, alpha=sd_mecha.weights({"b": 0.5}, default=1.0))
    assert merged(difference) == {"a": -1.0, "b": 0.0, "c": -1.0}
    alpha, beta = sd_mecha.weights({"a": 1.0}), sd_mecha.weights({"c": 1.0}, default=0.5)
    both = sd_mecha.weighted_sum(sd_mecha.weighted_sum(a, b, alpha=alpha), c, alpha=beta)
    assert merged(both) == {"a": 3.0, "b": 2.5, "c": 4.0}


def test_threads_and_memory_make_no_difference() -> None:
    keys = layers(6)
    recipe = sd_mecha.weighted_sum(model(0.0, *keys), model(1.0, *keys), alpha=sd_mecha.weights("ramp up"))
    expected = {key: round(int(key.split(".")[1]) / 5, 6) for key in keys}
    assert merged(recipe) == expected
    threaded = sd_mecha.merge(recipe, threads=2, total_buffer_size=1 << 16, output_dtype=None)
    assert {k: round(t[0, 0].item(), 6) for k, t in threaded.items() if k != "__metadata__"} == expected


def test_one_node_for_two_configs_and_below_a_conversion() -> None:
    alpha = sd_mecha.weights({"*bias": 0.25}, default=0.75)
    shape = SD1.keys()[IN00].shape
    sd1 = [sd_mecha.model({IN00: torch.full(shape, v)}, config="sd1-ldm") for v in (0.0, 1.0)]
    swapped = sd_mecha.exchange_ema(sd_mecha.weighted_sum(*sd1, alpha=alpha))  # its keys have other names
    average = "model_ema.diffusion_modelinput_blocks00bias"
    assert merged(swapped | sd_mecha.weighted_sum(*sd1, alpha=alpha)) == {IN00: 0.25}
    ema = [sd_mecha.model({average: torch.full(shape, v)}, config="sd1-ldm") for v in (0.0, 1.0)]
    both = [a | b for a, b in zip(sd1, ema, strict=True)]
    exchanged = sd_mecha.exchange_ema(sd_mecha.weighted_sum(*both, alpha=sd_mecha.weights({IN00: 0.25}, default=0.75)))
    assert merged(exchanged) == {IN00: 0.75, average: 0.25}


def test_a_method_of_several_numbers_takes_several_weights() -> None:
    tensors = {key: torch.tensor([[2.0, 1.0], [1.0, 3.0]]) for key in "ab"}
    a = sd_mecha.model(tensors, merge_space="delta")
    rank = sd_mecha.get_rank_from_ratio(a, sd_mecha.weights({"a": 0.5}, default=1.0))
    got = sd_mecha.merge(sd_mecha.truncate_rank(a, rank), output_dtype=None, strict_merge_space=None)
    assert [torch.linalg.matrix_rank(got[key], tol=1e-4).item() for key in "ab"] == [1, 2]


def test_it_passes_the_checks_for_methods() -> None:
    rules = sd_mecha.weights({"ten*": 0.5}).args[0].children[0].value_dict["key"]
    check_merge_method(merge_methods.resolve("weights"), examples=[{"rules": rules}])


# --- what cannot be right ------------------------------------------------------------------------------------------


def test_patterns_that_select_nothing_are_named_once_for_each_plan(caplog: pytest.LogCaptureFixture) -> None:
    alpha = sd_mecha.weights({"*": 0.5, "*.attn9.*": 1.0, "type:norm": 1.0})
    recipe = sd_mecha.weighted_sum(model(0.0), model(1.0), alpha=alpha)
    with caplog.at_level(logging.WARNING, "sd_mecha"):
        merged(recipe)
        merged(recipe)
    messages = [record.getMessage() for record in caplog.records if "weights" in record.getMessage()]
    assert messages == ["weights: nothing in structural is given a number by '*.attn9.*', 'type:norm'"] * 2


def test_strict_refuses_patterns_that_select_nothing() -> None:
    alpha = sd_mecha.weights({"*.attn9.*": 1.0}, strict=True)
    with pytest.raises(ParameterError, match=r"structural .*'\*\.attn9\.\*'"):
        sd_mecha.plan(sd_mecha.weighted_sum(model(0.0), model(1.0), alpha=alpha))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"re:[": 1}, r"'re:\[': the regular expression is malformed"),
        ({"type:attentio": 1}, r"'type:attentio': no layer type .*did you mean 'attention'"),
        ({"type:": 1}, "'type:': the pattern is empty"),
        ({"": 1}, "'': the pattern is empty"),
        ({"*": []}, "'*': the gradient is empty"),
        ({"*": float("nan")}, "nan is no finite number"),
        ({"*": [0, math.inf]}, "inf is no finite number"),
        ({"*": 10**400}, "is no finite number"),
        ({"*": "COSIN"}, "no preset is called 'COSIN'; did you mean 'COSINE'"),
        ({"*": True}, "True is no value"),
        ({"*": None}, "None is no value"),
        ({1: 1}, "a pattern is a str, got 1"),
        (0.5, "a float is no rules"),
        ([0.5, "x"], "'x' is no value"),
    ],
)
def test_malformed_rules_are_refused_at_once(rules: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message.replace("'*'", r"'\*'")):
        sd_mecha.weights(rules)


def test_the_default_is_a_finite_number() -> None:
    for bad in (math.nan, True, "x"):
        with pytest.raises(ParameterError, match="default is"):
            sd_mecha.weights({}, default=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"component:clip": 1}, "'component:clip': sd1-ldm has no component 'clip'; did you mean 'clip_l'"),
        ({"block:IN3": 1}, "'block:IN3': sd1-ldm has no block 'IN3'; did you mean 'IN03'"),
        ({"block:input_blocks.3-12": 1}, "has no block 'input_blocks.3-12'"),
        ({"block:clip_l.layers.0-vae.encoder.down.1": 1}, "has no block"),
        ([0.5] * 20, "'network': 20 numbers, but sd1-ldm has 25 such blocks; expected 25 or 26"),
    ],
)
def test_what_the_config_lacks_is_named_with_what_it_has(rules: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        table(rules)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[["*"]]', '[["*",{"mix":[1]}]]', '[["*",{"each":1}]]'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="weights"):
        read_rules(text)
