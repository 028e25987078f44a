from __future__ import annotations

from sd_mecha.recipes import provider
from sd_mecha.recipes.building import model
from sd_mecha.recipes.nodes import LiteralRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import children, fold, rewrite, toposort


def chain(length: int) -> RecipeNode:
    node: RecipeNode = model("a")
    other = model("b")
    for _ in range(length):
        node = node - other
    return node


def ladder(levels: int) -> RecipeNode:
    node: RecipeNode = model("a")
    for _ in range(levels):
        node = node - node
    return node


def test_toposort_of_several_roots_shares_what_they_share() -> None:
    a, b = model("a"), model("b")
    assert toposort(a - b, b - a, a) == [a, b, a - b, b - a]


def test_children_of_each_kind() -> None:
    a, b = model("a"), model("b")
    assert children(a) == ()
    assert children(LiteralRecipeNode({"x": a, "y": 1, "z": b})) == (a, b)
    assert children(a - b) == (a, b)


def test_fold_gives_values_in_the_order_of_children() -> None:
    recipe = (model("a") - model("b")) | model("a")

    def name(node: RecipeNode, below: list[str]) -> str:
        return node.path or "" if isinstance(node, ModelRecipeNode) else f"({' '.join(below)})"

    assert fold(recipe, name) == "((a b) a)"


def test_fold_calls_once_per_distinct_node() -> None:
    seen: list[RecipeNode] = []

    def depth(node: RecipeNode, below: list[int]) -> int:
        seen.append(node)
        return 1 + max(below, default=0)

    assert fold(ladder(64), depth) == 65
    assert len(seen) == 65


def test_rewrite_replaces_everywhere() -> None:
    a, b, c = model("a"), model("b"), model("c")
    ties = provider.current().method("ties_sum")
    recipe = ties(a, LiteralRecipeNode({"x": a, "y": 1}), k=a - b)
    expected = ties(c, LiteralRecipeNode({"x": c, "y": 1}), k=c - b)
    assert rewrite(recipe, lambda node: c if node == a else node) == expected


def test_rewrite_without_change_keeps_the_nodes() -> None:
    recipe = chain(10)
    assert rewrite(recipe, lambda node: node) is recipe


def test_long_chain() -> None:
    recipe = chain(100_000)
    assert len(toposort(recipe)) == 100_002
    assert fold(recipe, lambda node, below: 1 + max(below, default=0)) == 100_001
    renamed = rewrite(recipe, lambda node: model("z") if node == model("a") else node)
    assert model("z") in renamed
    assert model("a") not in renamed


def test_wide_node() -> None:
    recipe = provider.current().method("n_average")(*[model(str(i % 5_000)) for i in range(10_000)])
    order = toposort(recipe)
    assert len(order) == 5_001
    assert [node.path for node in order[:3] if isinstance(node, ModelRecipeNode)] == ["0", "1", "2"]
