"""Laws of rules between layouts, on random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha.extensions.layouts import (
    Link,
    Part,
    Rule,
    RuleTable,
    below,
    inverse,
    keep,
    links,
    prefixed,
    rename,
    split,
    squeeze,
    swap,
    transpose,
)
from sd_mecha.extensions.translations import apply

KINDS = ("rename", "split", "sized", "swap", "squeeze", "transpose")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Rule], dict[str, tuple[int, ...]]]:
    """Rules, one for each kind drawn, and two layers of tensors that they are for."""
    rules: list[Rule] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for index, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))):
        source, target = f"layers.*.s{index}", f"blocks.*.t{index}"
        shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
        if kind == "split":
            parts = draw(st.integers(1, 3))
            rules.append(split(source, *(f"{target}.{i}" for i in range(parts))))
            shape = (parts * draw(st.integers(1, 3)), *shape)
        elif kind == "sized":
            sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
            rules.append(split(source, *(f"{target}.{i}" for i in range(len(sizes))), sizes=sizes))
            shape = (sum(sizes), *shape)
        elif kind == "swap":
            rules.append(swap(source, target))
            shape = (2 * draw(st.integers(1, 3)), *shape)
        elif kind == "squeeze":
            rules.append(squeeze(source, target))
            shape = draw(st.sampled_from([(3, 2, 1, 1), (3, 2, 1), (3, 2), (3,), (3, 2, 3, 3)]))
        elif kind == "transpose":
            rules.append(transpose(source, target))
            shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        else:
            rules.append(rename(source, target))
        shapes |= {source.replace("*", str(layer)) + ".weight": shape for layer in (0, 12)}
    return rules, shapes


@given(layouts())
def test_there_and_back_is_where_it_started(case: tuple[list[Rule], dict[str, tuple[int, ...]]]) -> None:
    rules, shapes = case
    start = {key: torch.randn(shape) for key, shape in shapes.items()}
    forward = links(rules, shapes)
    there = {key: apply(link, start) for key, link in forward.items()}
    assert {key: tuple(tensor.shape) for key, tensor in there.items()} == {k: link.shape for k, link in forward.items()}
    assert sum(tensor.numel() for tensor in there.values()) == sum(tensor.numel() for tensor in start.values())
    back = inverse(forward, shapes)
    assert back.keys() == shapes.keys()
    for key, tensor in start.items():
        assert torch.equal(apply(back[key], there), tensor)


@given(layouts(), st.data())
def test_what_lies_elsewhere_in_part_only_does_not_come_back(
    case: tuple[list[Rule], dict[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    rules, shapes = case
    forward = links(rules, shapes)
    lost = data.draw(st.sampled_from(sorted(forward)))
    sources = {part.key for part in forward[lost].parts}
    back = inverse({key: link for key, link in forward.items() if key != lost}, shapes)
    assert back.keys() == shapes.keys() - sources


class TestRules:
    def test_the_longest_rule_counts_then_the_most_literal_one(self) -> None:
        rules = [rename("a.*", "x.*"), rename("a.*.b", "y.*"), rename("a.7.b", "last"), rename("a.*.b.0", "z.*")]
        shapes = dict.fromkeys(["a.1.c", "a.1.b.w", "a.7.b.w", "a.7.b.0", "other"], (2,))
        made = links(rules, shapes)
        assert {link.parts[0].key: key for key, link in made.items()} == {
            "a.1.c": "x.1.c",
            "a.1.b.w": "y.1.w",
            "a.7.b.w": "last.w",
            "a.7.b.0": "z.7",
        }

    def test_names_are_whole_words(self) -> None:
        assert links([rename("a.b", "c")], {"a.bc": (1,)}) == {}

    def test_stars_are_filled_in_order(self) -> None:
        (key,) = links([rename("a.*.1.*.b", "x.*.y.*.z")], {"a.5.1.6.b.weight": ()})
        assert key == "x.5.y.6.z.weight"

    def test_patterns_find_patterns(self) -> None:
        table = RuleTable([split("a.*.qkv", "b.*.q", "b.*.k", "b.*.v")])
        assert table.find("a.*.qkv.weight")[1] == ["b.*.q.weight", "b.*.k.weight", "b.*.v.weight"]
        assert table.find("a.x.qkv") == (None, [])

    def test_prefixes(self) -> None:
        shapes = dict.fromkeys(["a.1.x", "a.2.x", "b"], (1,))
        assert list(links(prefixed(shapes, "net."), shapes)) == ["net.a.1.x", "net.a.2.x", "net.b"]
        moved = links(below([rename("a.*", "c.*")], "net."), {"net.a.1.x": (1,), "a.1.x": (1,)})
        assert {key: link.parts[0].key for key, link in moved.items()} == {"c.1.x": "net.a.1.x"}

    def test_a_swap(self) -> None:
        assert links([swap("a", "b")], {"a": (6, 2)})["b"] == Link("b", (Part("a", 3, 6), Part("a", 0, 3)), (6, 2))

    @pytest.mark.parametrize(
        ("rule", "shape", "message"),
        [
            (split("a", "b", "c"), (3,), "cannot be divided into 2"),
            (split("a", "b", "c", sizes=(1, 1)), (3,), "cannot be divided into 2"),
            (swap("a", "b"), (3,), "no two halves"),
        ],
    )
    def test_rows_that_cannot_be_divided(self, rule: Rule, shape: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            links([rule], {"a": shape})

    def test_two_tensors_of_one_name(self) -> None:
        with pytest.raises(ValueError, match="'c' is made of 'a' and of 'b'"):
            links([rename("a", "c"), rename("b", "c")], {"a": (1,), "b": (1,)})

    def test_kept_names(self) -> None:
        assert list(links(keep("a", "b.*"), {"a.x": (1,), "b.3.y": (1,), "c": (1,)})) == ["a.x", "b.3.y"]
