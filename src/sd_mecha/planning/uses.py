"""Values that fit anywhere, used where they cannot be the same thing: each use gets a node of its own.

A number in a recipe has neither a config nor a merge space; it takes those of the place where it is used. Nodes are
equal by structure, so the 0.5 of one call is the 0.5 of every other one, also where one stands for the keys of a LoRA
and the other for those of a checkpoint, or one is a parameter and the other a weight. Analyses say one thing of each
node; so where uses may differ, copies take their place, told apart by who uses them. A user of copies stays equal to
what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from sd_mecha.extensions.merge_spaces import MergeSpaceSymbol
from sd_mecha.extensions.method import method_of
from sd_mecha.recipes.base import freeze
from sd_mecha.recipes.nodes import MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import fold, toposort


def unshare(root: RecipeNode) -> RecipeNode:
    """An equal recipe in which every use of a value that fits anywhere can be analysed on its own."""
    order = toposort(root)
    free: set[bytes] = set()  # fingerprints, which are quicker to hash than nodes
    users: dict[bytes, set[bytes]] = {}
    spaces: dict[bytes, set[object]] = {}  # what uses say of the merge space; a symbol is another one for each user
    several_configs = False
    for node in order:
        if isinstance(node, MergeRecipeNode):
            declares = method_of(node).declares_configs
            if _is_free(node, declares, free):
                free.add(node.fingerprint)
                continue
            several_configs |= declares
        if all(child.fingerprint not in free for child in node.children):
            continue
        for space, child in _uses(node):
            if child.fingerprint in free:
                users.setdefault(child.fingerprint, set()).add(node.fingerprint)
                spaces.setdefault(child.fingerprint, set()).add(space if space is not None else node.fingerprint)
    shared = {child for child, found in users.items() if len(found) > 1} if several_configs else set()
    shared.update(child for child, found in spaces.items() if len(found) > 1)
    return _with_copies(order, free, shared) if shared else root


def _is_free(node: MergeRecipeNode, declares: bool, free: set[bytes]) -> bool:
    """Whether nothing at or below a node says what its config is."""
    method = method_of(node)
    if node.model_config is not None or method.declaration.result.model_config is not None:
        return False
    if not declares:
        return all(child.fingerprint in free for child in node.children)
    configs = method.get_input_configs()
    declared = [*configs.args_varargs(len(node.args)), *(configs.kwargs[name] for name in node.kwargs)]
    return all(c is not None or child.fingerprint in free for c, child in zip(declared, node.children, strict=True))


def _uses(node: RecipeNode) -> Iterator[tuple[object, RecipeNode]]:
    """The inputs of a node with the merge spaces that it takes there, None where they depend on other inputs."""
    if not isinstance(node, MergeRecipeNode):
        yield from ((None, child) for child in node.children)
        return
    spaces = method_of(node).get_input_merge_spaces()
    declared = [*spaces.args_varargs(len(node.args)), *(spaces.kwargs[name] for name in node.kwargs)]
    for space, child in zip(declared, node.children, strict=True):
        yield None if isinstance(space, MergeSpaceSymbol) else space, child


def _with_copies(order: list[RecipeNode], free: set[bytes], shared: set[bytes]) -> RecipeNode:
    new: dict[bytes, RecipeNode] = {}
    for node in order:
        made = node
        if node.fingerprint not in free:
            children = [
                _copy(child, node, place) if child.fingerprint in shared else new[child.fingerprint]
                for place, child in enumerate(node.children)
            ]
            if any(a is not b for a, b in zip(children, node.children, strict=True)):
                made = _equal(node.with_children(children), node.fingerprint)
        new[node.fingerprint] = made
    return new[order[-1].fingerprint]


def _copy(value: RecipeNode, user: RecipeNode, place: int) -> RecipeNode:
    salt = user.fingerprint + place.to_bytes(8, "little")

    def copied(node: RecipeNode, children: list[RecipeNode]) -> RecipeNode:
        if isinstance(node, ModelRecipeNode):
            return node
        return _equal(node.with_children(children), blake2b(salt + node.fingerprint, digest_size=16).digest())

    return fold(value, copied)


def _equal(node: RecipeNode, fingerprint: bytes) -> RecipeNode:
    freeze(node, "fingerprint", fingerprint)
    return node
