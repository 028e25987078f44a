"""The traversals of a recipe.

None recurses, and each distinct node is seen once: a chain of 100,000 nodes and a ladder of 64 levels
`x = f(x, x)` both take time linear in the number of distinct nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sd_mecha.recipes.base import RecipeNode

T = TypeVar("T")


def children(node: RecipeNode) -> tuple[RecipeNode, ...]:
    """Return the nodes that a node is made from, in order."""
    return node.children


def toposort(*roots: RecipeNode) -> list[RecipeNode]:
    """Return every distinct node of the recipes in post-order: children in their order, then their parent."""
    order: list[RecipeNode] = []
    entered: set[bytes] = set()
    done: set[bytes] = set()
    stack = list(reversed(roots))
    while stack:
        node = stack[-1]
        key = node.fingerprint
        if key in entered:  # met again: its children are finished, or it was reached by another way before
            stack.pop()
            if key not in done:
                done.add(key)
                order.append(node)
            continue
        entered.add(key)
        stack.extend([child for child in reversed(node.children) if child.fingerprint not in done])
    return order


def fold(root: RecipeNode, fn: Callable[[RecipeNode, list[T]], T]) -> T:
    """Compute a value from the leaves up: `fn(node, values of its children)`, once per distinct node."""
    values: dict[bytes, T] = {}
    for node in toposort(root):
        values[node.fingerprint] = fn(node, [values[child.fingerprint] for child in node.children])
    return values[root.fingerprint]


def rewrite(root: RecipeNode, fn: Callable[[RecipeNode], RecipeNode]) -> RecipeNode:
    """Rebuild a recipe from the leaves up.

    Args:
        root: the recipe.
        fn: called once per distinct node, after its children were rewritten, with the node over its new
            children; returns what stands in its place.
    """

    def rebuilt(node: RecipeNode, new: Sequence[RecipeNode]) -> RecipeNode:
        same = all(a is b for a, b in zip(node.children, new, strict=True))
        return fn(node if same else node.with_children(new))

    return fold(root, rebuilt)
