"""Writing and reading back: laws, golden texts, size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sd_mecha.errors import RecipeTypeError
from sd_mecha.recipes import provider
from sd_mecha.recipes.building import literal, model
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.text import deserialize_text, serialize_text
from sd_mecha.recipes.walk import toposort
from tests.recipes.fakes import FakeProvider, Name

GOLDEN = Path(__file__).parents[1] / "golden" / "recipes" / "public"
CASES = {case["id"]: case for case in json.loads((GOLDEN / "manifest.json").read_text("utf-8"))["cases"]}


def golden(name: str) -> str:
    return (GOLDEN / f"{name}.mecha").read_bytes().decode()


def read(body: str) -> RecipeNode:
    return deserialize_text("version 0.1.0\n" + body)


def read_dict(body: str) -> dict[str, Any]:
    node = read(body)
    assert isinstance(node, LiteralRecipeNode)
    return node.value_dict


def written(node: RecipeNode) -> list[str]:
    version, *lines = serialize_text(node).split("\n")
    assert version == "version 0.1.0"
    return lines


nasty_text = st.one_of(
    st.text(max_size=8),
    st.text(st.sampled_from(" =\"\\&#'\n\r\t\x00\x0b\x1c\x85\u2028\ufeff\ud800\udfffnrtu0e9é🙂"), max_size=12),
    st.sampled_from(["null", "true", "1", "&0", "#", "", "key=1", '"', "\\", "\\n", "\\u00e9", "C:\\new\\table"]),
)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**5000), 10**5000),
    st.floats(),
    nasty_text,
)
names = st.none() | nasty_text.filter(lambda name: not name.startswith("nope")).map(Name)
METHODS = ["weighted_sum", "subtract", "n_average", "ties_sum", "a \"quoted\" 'method' = \\ \n"]


@st.composite
def recipes(draw: st.DrawFn) -> RecipeNode:
    """Build a graph from the leaves up; every node may use any earlier one, so sub-graphs are shared."""
    nodes: list[RecipeNode] = [ModelRecipeNode(draw(nasty_text), draw(names), draw(names))]
    for kind in draw(st.lists(st.sampled_from(["model", "dict", "nodes", *METHODS]), max_size=8)):
        earlier = st.sampled_from(nodes)
        if kind == "model":
            node: RecipeNode = ModelRecipeNode(draw(nasty_text), draw(names), draw(names))
        elif kind in ("dict", "nodes"):
            items = draw(st.dictionaries(nasty_text, values if kind == "dict" else values | earlier, max_size=4))
            node = LiteralRecipeNode(items, draw(names), draw(names))
        elif kind in ("weighted_sum", "subtract"):
            node = provider.current().method(kind)(draw(earlier), draw(earlier))
        else:
            inputs = draw(st.lists(earlier | values, max_size=4))
            options = {} if kind == "n_average" else {"k": draw(earlier | values)}
            node = provider.current().method(kind)(*inputs, **options)
        nodes.append(node)
    return nodes[-1]


class TestRoundTrip:
    @settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(recipes())
    def test_any_recipe_comes_back_equal(self, recipe: RecipeNode) -> None:
        text = serialize_text(recipe)
        again = deserialize_text(text)
        assert again == recipe
        assert serialize_text(again) == text
        # neither a text file nor `splitlines` tears a line apart
        assert deserialize_text(text.splitlines()) == recipe
        assert deserialize_text(text.encode().decode().replace("\n", "\r\n")) == recipe

    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("round_trip") == "same text"])
    def test_golden_texts_come_back_byte_for_byte(self, fakes: FakeProvider, name: str) -> None:
        fakes.any_method = True
        assert serialize_text(deserialize_text(golden(name))) == golden(name)

    @pytest.mark.parametrize(
        "name",
        [
            "weighted_inf",
            "weighted_nan",
            "equals_path",
            "dict_nodes",
            "dict_none",
            "empty_dict",
            "finalized_structural",
        ],
    )
    def test_texts_that_the_last_release_wrote_and_could_not_read(self, fakes: FakeProvider, name: str) -> None:
        fakes.any_method = True
        assert serialize_text(deserialize_text(golden(name))) == golden(name)

    def test_a_name_with_an_unescaped_quote_is_read_as_it_was_meant(self) -> None:
        assert read_dict(golden("dict_key_quote").split("\n")[3]) == {'q"q': 0.5, "w": 0.1}

    def test_a_name_with_an_unescaped_backslash_keeps_the_meaning_it_had(self) -> None:
        assert read_dict(golden("dict_key_backslash").split("\n")[3]) == {"ab": 0.5}

    @pytest.mark.parametrize(
        "name",
        ["hw_comment", "hw_ws", "hw_blank", "hw_named", "hw_comment_indented", "hw_plus", "hw_underscore"],
    )
    def test_hand_written_texts(self, name: str) -> None:
        a, b = ModelRecipeNode("models/a.safetensors"), ModelRecipeNode("models/b.safetensors")
        weight = ModelRecipeNode("models/a.safetensors", None, Name("weight"))
        b_weight = ModelRecipeNode("models/b.safetensors", None, Name("weight"))
        mix = provider.current().method("weighted_sum")
        expected = {
            "hw_comment": mix(weight, b_weight, 0.25),
            "hw_ws": mix(weight, b),
            "hw_blank": mix(a, b),
            "hw_named": mix(a, b, 0.5),
            "hw_comment_indented": a,
            "hw_plus": mix(a, b, 0.5),
            "hw_underscore": mix(a, b, 10),
        }
        assert deserialize_text(golden(name)) == expected[name]


class TestWriting:
    def test_equal_instructions_are_written_once(self) -> None:
        a = model("a")
        mix = provider.current().method("weighted_sum")
        assert written(mix(mix(a, model("b"), 0.5), a, 0.5)) == [
            'model "a" model_config=null merge_space="weight"',
            'model "b" model_config=null merge_space="weight"',
            "dict key=0.5",
            'literal &2 model_config="singleton-mecha" merge_space=null',
            'merge "convert_singleton" &3',
            'merge "weighted_sum" &0 &1 &4',
            'merge "weighted_sum" &5 &0 &4',
        ]

    def test_a_dict_line_is_shared_by_literals_of_different_config(self) -> None:
        one, other = LiteralRecipeNode({"a": 1}, Name("x")), LiteralRecipeNode({"a": 1}, Name("y"))
        assert written(one | other)[:3] == [
            "dict a=1",
            'literal &0 model_config="x" merge_space=null',
            'literal &0 model_config="y" merge_space=null',
        ]

    def test_one_true_and_one_point_zero_are_three_values(self) -> None:
        average = provider.current().method("n_average")
        nodes = [LiteralRecipeNode({"k": value}) for value in (1, True, 1.0)]
        assert written(average(*nodes))[:-1] == ["dict k=1", "dict k=true", "dict k=1.0"]

    @pytest.mark.parametrize(
        ("key", "line"),
        [
            ("a.b", "dict a.b=0"),
            ("", "dict =0"),
            ("#x", "dict #x=0"),
            ("&0", "dict &0=0"),
            ("é\u3000\t", "dict é\u3000\t=0"),
            ("a b", r"dict a\ b=0"),
            ('q"', r"dict q\"=0"),
            ("a\\b", r"dict a\\b=0"),
            ("a=b", 'dict "a=b"=0'),
            ('a\n=\\"', r'dict "a\n=\\\""=0'),
            ("\ud800", r'dict "\ud800"=0'),
        ],
    )
    def test_keys_are_bare_wherever_the_last_release_read_them_bare(self, key: str, line: str) -> None:
        node = LiteralRecipeNode({key: 0})
        assert written(node) == [line]
        assert read_dict(line) == {key: 0}

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (1e-7, "1e-07"),
            (-0.0, "-0.0"),
            (float("inf"), "inf"),
            (float("-inf"), "-inf"),
            (float("nan"), "nan"),
            pytest.param(10**4000, "1" + "0" * 4000, id="big"),
            pytest.param(-(2**20_000), "-0x1" + "0" * 5000, id="huge"),
            ('say "hi" \\ é🙂', r'"say \"hi\" \\ é🙂"'),
            ("tab\tand\x00nul", '"tab\tand\x00nul"'),
            ("a\r\n\u2028\x85", r'"a\r\n\u2028\u0085"'),
        ],
    )
    def test_values(self, value: Any, text: str) -> None:
        assert written(LiteralRecipeNode({"k": value})) == [f"dict k={text}"]
        again = read_dict(f"dict k={text}")["k"]
        assert again == value or math.isnan(again)
        assert type(again) is type(value)

    def test_a_tensor_is_refused_with_its_place(self) -> None:
        recipe = model("a") | LiteralRecipeNode({"w": torch.ones(2, 3)})
        with pytest.raises(RecipeTypeError) as caught:
            serialize_text(recipe)
        assert str(caught.value) == (
            "this recipe cannot be written as text, which holds no tensors: <literal {'w': tensor(2, 3)}> "
            "(input of merge 'fallback'): key 'w' holds a tensor: use a number, or save it to a file and use "
            "model() of its path"
        )

    def test_a_model_in_memory_is_refused_with_what_to_do(self) -> None:
        with pytest.raises(RecipeTypeError) as caught:
            serialize_text(model({"w": torch.ones(1)}))
        assert str(caught.value) == (
            "this recipe cannot be written as text, which holds no tensors: <model in memory (1 keys)>: save "
            "its tensors to a file and give the path of that to model()"
        )

    def test_only_nodes_are_written(self) -> None:
        with pytest.raises(RecipeTypeError, match="only recipe nodes can be written as text, got float"):
            serialize_text(0.5)  # type: ignore[arg-type]


class TestReading:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1_0", 10),
            ("+5", 5),
            ("-0", 0),
            (".5", 0.5),
            ("5.", 5.0),
            ("1E5", 1e5),
            ("\uff11\uff12", 12),
            ("Infinity", math.inf),
            ("0xFF", 255),
            ("null", None),
            (r"\null", None),
            ('"null"', "null"),
            ('"&0"', "&0"),
            (r'"b\xc"', "bxc"),
            (r'"\u12"', "u12"),
            (r'"\n\r\t\u00e9"', "\n\r\té"),
            ('"a=1 b=2 # c"', "a=1 b=2 # c"),
        ],
    )
    def test_values(self, text: str, value: Any) -> None:
        found = read_dict(f"dict k={text}")["k"]
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ('dict a="x"=3', {"a": "x", "": 3}),
            (r"dict \"x=3 \ =1", {'"x': 3, " ": 1}),
            (r"dict a=1 b\=2", {"a": 1, "b": 2}),
            ("dict a=1 b=2\t", {"a": 1, "b": 2}),
            ("dict", {}),
        ],
    )
    def test_odd_lines_mean_what_they_always_meant(self, line: str, expected: dict[str, Any]) -> None:
        assert read_dict(line) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "version 0.1.0\ndict a=1\n",
            "\ufeffversion 0.1.0\r\ndict a=1\r\n\r\n",
            "# first\n\nversion 0.1.0  \n  # c\n\n \t dict  a=1  \n# last",
            ["version 0.1.0", "dict a=1"],
            ["version 0.1.0\n", "dict a=1\n"],
            ["version 0.1.0\r\n", "dict a=1\r\n"],
        ],
    )
    def test_blank_lines_comments_line_ends_and_byte_order_mark(self, text: Any) -> None:
        assert deserialize_text(text) == LiteralRecipeNode({"a": 1})

    def test_config_and_space_may_stand_without_their_names(self) -> None:
        expected = ModelRecipeNode("a", Name("sd1-ldm"), Name("delta"))
        assert read('model "a" "sd1-ldm" "delta"') == expected
        assert read('dict a=1\nliteral &0 "x"') == LiteralRecipeNode({"a": 1}, Name("x"))

    def test_a_dict_may_hold_nodes_and_dicts(self) -> None:
        inner = LiteralRecipeNode({"a": 1})
        assert read("dict a=1\ndict x=&0 y=&0") == LiteralRecipeNode({"x": inner, "y": inner})

    def test_values_may_stand_in_a_merge(self) -> None:
        mix = provider.current().method("weighted_sum")
        a = ModelRecipeNode("a")
        assert read('model "a"\nmerge "weighted_sum" &0 b=&00 alpha=0.25') == mix(a, a, 0.25)


class TestSize:
    def test_a_chain_of_100_000_merges(self) -> None:
        node: RecipeNode = model("a")
        others = [model(f"m{i}") for i in range(10)]
        for i in range(100_000):
            node = node - others[i % 10]
        text = serialize_text(node)
        assert text.count("\n") == 100_011
        assert deserialize_text(text) == node

    def test_a_ladder_of_64_levels(self) -> None:
        node: RecipeNode = model("a")
        for _ in range(64):
            node = node - node
        assert len(written(node)) == 65
        assert deserialize_text(serialize_text(node)) == node

    def test_a_merge_of_10_000_inputs(self) -> None:
        node = provider.current().method("n_average")(*[model(str(i)) for i in range(10_000)])
        again = deserialize_text(serialize_text(node))
        assert isinstance(again, MergeRecipeNode)
        assert len(again.args) == 10_000
        assert again == node

    def test_a_dict_of_100_000_keys_and_a_long_string(self) -> None:
        node = literal({str(i): i for i in range(100_000)}) | LiteralRecipeNode({"s": '\\"x' * 300_000})
        assert deserialize_text(serialize_text(node)) == node
        assert len(toposort(node)) == 3
