"""Ready-made recipes that copy a part of one model into another, or of one difference into another."""

from __future__ import annotations

from sd_mecha.builtin.methods import linear, regions
from sd_mecha.extensions.merge_methods import RecipeNodeOrValue, value_to_node
from sd_mecha.recipes.nodes import RecipeNode


def copy_region(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue | None = None,
    *,
    width: RecipeNodeOrValue = 1.0,
    offset: RecipeNodeOrValue = 0.0,
    top_k: bool = False,
) -> RecipeNode:
    """Copy a part of each tensor of `b` into `a`; with a base `c`, of their differences from it.

    Args:
        a: the model to copy into.
        b: the model to copy from.
        c: the common base: the differences `a - c` and `b - c` are combined and added to it.
        width: the share to copy.
        offset: where the part begins, as a share.
        top_k: copy an order of values, for a range of magnitudes (`top_k_tensor_sum`), instead of a range of rows (the
            method `tensor_sum`).

    >>> import sd_mecha, torch
    >>> a, b = (sd_mecha.model({"w": torch.tensor(v)}) for v in ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]))
    >>> sd_mecha.merge(copy_region(a, b, width=0.5, offset=0.25), output_dtype=None)["w"]
    tensor([1., 0., 0., 4.])
    """
    a, b = value_to_node(a), value_to_node(b)
    copy = regions.top_k_tensor_sum if top_k else regions.tensor_sum
    if c is None:
        return copy(a, b, width=width, offset=offset)
    base = value_to_node(c)
    spliced = copy(linear.subtract(a, base), linear.subtract(b, base), width=width, offset=offset)
    return linear.add_difference(base, spliced)


tensor_sum = copy_region
