"""Where in a recipe a problem lies: the path from the root down to a node, in words."""

from __future__ import annotations

from sd_mecha.extensions.method import method_of
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import children
from sd_mecha.storage.remote.addresses import shown_path

LONGEST = 12


def describe(node: RecipeNode) -> str:
    """A node in a few words."""
    if isinstance(node, MergeRecipeNode):
        return str(node.merge_method.identifier)
    if isinstance(node, ModelRecipeNode):
        return f'model "{shown_path(node.path)}"' if node.path is not None else "in-memory model"
    if isinstance(node, LiteralRecipeNode):
        values = list(node.value_dict.items())
        shown = ", ".join(f"{k}={_short(v)}" for k, v in values[:3])
        return "literal {" + shown + (", ..." if len(values) > 3 else "") + "}"
    return repr(node)


def _short(value: object) -> str:
    text = "tensor" if hasattr(value, "shape") else "node" if isinstance(value, RecipeNode) else repr(value)
    return text if len(text) <= 24 else text[:21] + "..."


def path_to(root: RecipeNode, target: RecipeNode) -> str:
    """The shortest way from `root` to `target`, for example ``weighted_sum > b: slerp > a: model "x"``."""
    came_from: dict[RecipeNode, tuple[RecipeNode, str] | None] = {root: None}
    queue = [root]
    for node in queue:
        if node == target:
            break
        for name, child in named_children(node):
            if child not in came_from:
                came_from[child] = (node, name)
                queue.append(child)
    if target not in came_from:
        return describe(target)
    steps: list[str] = []
    here: RecipeNode = target
    while (origin := came_from[here]) is not None:
        steps.append(f"{origin[1]}: {describe(here)}")
        here = origin[0]
    steps.append(describe(root))
    steps.reverse()
    if len(steps) > LONGEST:
        half = LONGEST // 2
        steps = [*steps[:half], f"({len(steps) - 2 * half} more)", *steps[-half:]]
    return " > ".join(steps)


def named_children(node: RecipeNode) -> list[tuple[str, RecipeNode]]:
    """The inputs of a node with the names of the parameters they are bound to."""
    if not isinstance(node, MergeRecipeNode):
        return [(str(i), child) for i, child in enumerate(children(node))]
    names = method_of(node).get_param_names().args_varargs(len(node.args))
    return [*zip(names, node.args, strict=False), *node.kwargs.items()]
