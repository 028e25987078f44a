"""Ready-made recipes: ordinary functions that combine merge methods into nodes, and compute nothing."""

from __future__ import annotations

from typing import Any

from sd_mecha.builtin.methods import bounds, linear, rotation, spherical, stock, ties
from sd_mecha.errors import MergeSpaceError
from sd_mecha.extensions.merge_methods import RecipeNodeOrValue, value_to_node
from sd_mecha.recipes.nodes import RecipeNode


def add_difference(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue | None = None,
    *,
    alpha: RecipeNodeOrValue = 1.0,
    clamp_to_ab: bool = False,
) -> RecipeNode:
    """Add to `a` what leads from `c` to `b`: `a + alpha * (b - c)`, and `a` for keys that cannot be made.

    Args:
        a: the model that receives the difference.
        b: the model the difference leads to; without `c`, the difference itself (a delta).
        c: the model the difference starts from, usually the common base.
        alpha: how much of the difference is added; a number, per key or block, or a mask.
        clamp_to_ab: keep each weight within the range of `a` and `b`, which must then be of one kind.

    Raises:
        MergeSpaceError: `clamp_to_ab` is set and `a` and `b` are known to be of different kinds.

    >>> import sd_mecha, torch
    >>> a, b, c = (sd_mecha.model({"w": torch.tensor([value])}) for value in (1.0, 5.0, 2.0))
    >>> sd_mecha.merge(add_difference(a, b, c, alpha=0.5), output_dtype=None)["w"]
    tensor([2.5000])
    """
    a, b = value_to_node(a), value_to_node(b)
    difference = b if c is None else linear.subtract(b, value_to_node(c))
    result = linear.add_difference(a, difference, alpha)
    if clamp_to_ab:
        _check_one_kind(a, b)
        result = bounds.clamp(result, a, b)
    return result | a


def _check_one_kind(a: RecipeNode, b: RecipeNode) -> None:
    spaces = a.merge_space, b.merge_space
    if None not in spaces and spaces[0] != spaces[1]:
        names = " and ".join(space.identifier for space in spaces if space is not None)
        raise MergeSpaceError(
            f"add_difference: clamp_to_ab compares a with b, but their merge spaces are {names}; "
            "give b as a whole model and the base as c"
        )


def add_perpendicular(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue,
    *,
    alpha: RecipeNodeOrValue = 1.0,
) -> RecipeNode:
    """Add to `a` the part of `b - c` that is orthogonal to `a - c`: what `b` learnt beyond what `a` did.

    Args:
        a: the model that receives the difference.
        b: the model to take from.
        c: the base of both.
        alpha: how much is added.

    >>> import sd_mecha, torch
    >>> a, b, c = (sd_mecha.model({"w": torch.tensor(v)}) for v in ([1.0, 0.0], [3.0, 2.0], [0.0, 0.0]))
    >>> sd_mecha.merge(add_perpendicular(a, b, c), output_dtype=None)["w"]
    tensor([1., 2.])
    """
    a, base = value_to_node(a), value_to_node(c)
    taught = spherical.perpendicular_component(linear.subtract(a, base), linear.subtract(b, base))
    return linear.add_difference(a, taught, alpha)


def rotate(
    a: RecipeNodeOrValue,
    b: RecipeNodeOrValue,
    c: RecipeNodeOrValue | None = None,
    *,
    alignment: RecipeNodeOrValue = 1.0,
    alpha: RecipeNodeOrValue = 0.0,
    cache: Any = None,
) -> RecipeNode:
    """Turn the neurons of `a` to where those of `b` lie, and blend the two there: the method `rotate`.

    Args:
        a: the model that is turned.
        b: the model that it is turned towards.
        c: the common base; with it, what `a` and `b` differ from it by is turned and blended, and added to it.
        alignment: 0 stays, 1 turns all the way.
        alpha: how much of `b` is mixed in.
        cache: keeps the rotations for further merges with other `alignment` and `alpha`: what the method's
            `create_cache()` makes.

    >>> import sd_mecha, torch
    >>> a = sd_mecha.model({"w": torch.tensor([[1.0, 0.0], [-1.0, 0.0]])})
    >>> b = sd_mecha.model({"w": torch.tensor([[0.0, 2.0], [0.0, -2.0]])})
    >>> sd_mecha.merge(sd_mecha.rotate(a, b), output_dtype=None)["w"].abs().round()
    tensor([[0., 1.],
            [0., 1.]])
    """
    base = None if c is None else value_to_node(c)
    first, second = (value_to_node(a), value_to_node(b)) if base is None else deltas_from(base, (a, b))
    turned = rotation.rotate(first, second, alignment=alignment, alpha=alpha).set_cache(cache)
    return turned if base is None else linear.add_difference(base, turned)


def add_difference_ties(
    base: RecipeNodeOrValue,
    *models: RecipeNodeOrValue,
    alpha: RecipeNodeOrValue = 1.0,
    k: RecipeNodeOrValue = 1.0,
) -> RecipeNode:
    """Add to `base` what `ties_sum` makes of several models' differences from it.

    Args:
        base: the common base, which also receives the result.
        models: fine-tunes of it; those known to be deltas are taken as they are.
        alpha: how much of the merged delta is added.
        k: the share of entries that each delta keeps; see `ties_sum`.

    >>> import sd_mecha, torch
    >>> base, a, b = (sd_mecha.model({"w": torch.tensor([value])}) for value in (1.0, 3.0, 5.0))
    >>> sd_mecha.merge(add_difference_ties(base, a, b), output_dtype=None)["w"]
    tensor([4.])
    """
    base = value_to_node(base)
    return linear.add_difference(base, ties.ties_sum(*deltas_from(base, models), k=k), alpha)


def add_difference_ties_extended(
    base: RecipeNodeOrValue,
    *models: RecipeNodeOrValue,
    alpha: RecipeNodeOrValue = 1.0,
    k: RecipeNodeOrValue = 0.2,
    vote_sgn: RecipeNodeOrValue = False,
    apply_stock: RecipeNodeOrValue = False,
    cos_eps: RecipeNodeOrValue = 1e-6,
    apply_median: RecipeNodeOrValue = False,
    eps: RecipeNodeOrValue = 1e-6,
    maxiter: RecipeNodeOrValue = 100,
    ftol: RecipeNodeOrValue = 1e-20,
) -> RecipeNode:
    """Add to `base` what `ties_sum_extended` makes of several models' differences from it.

    Args:
        base: the common base, which also receives the result.
        models: fine-tunes of it; those known to be deltas are taken as they are.
        alpha: how much of the merged delta is added.
        k, vote_sgn, apply_stock, cos_eps, apply_median, eps, maxiter, ftol: see `ties_sum_extended`.

    >>> import sd_mecha, torch
    >>> base, a, b = (sd_mecha.model({"w": torch.tensor([value])}) for value in (1.0, 3.0, 5.0))
    >>> sd_mecha.merge(add_difference_ties_extended(base, a, b, apply_stock=True), output_dtype=None)["w"]
    tensor([4.])
    """
    base = value_to_node(base)
    merged = ties.ties_sum_extended(
        *deltas_from(base, models),
        k=k,
        vote_sgn=vote_sgn,
        apply_stock=apply_stock,
        cos_eps=cos_eps,
        apply_median=apply_median,
        eps=eps,
        maxiter=maxiter,
        ftol=ftol,
    )
    return linear.add_difference(base, merged, alpha)


def n_model_stock(
    base: RecipeNodeOrValue,
    *models: RecipeNodeOrValue,
    cos_eps: RecipeNodeOrValue = 1e-6,
    filter_wise: RecipeNodeOrValue = False,
    pairs: RecipeNodeOrValue = "all",
    bounded: RecipeNodeOrValue = True,
) -> RecipeNode:
    """Add to `base` what `model_stock` makes of several models' differences from it.

    Args:
        base: the common base, which also receives the result.
        models: fine-tunes of it; those known to be deltas are taken as they are.
        cos_eps, filter_wise, pairs, bounded: see `model_stock`.

    >>> import sd_mecha, torch
    >>> base, a, b = (sd_mecha.model({"w": torch.tensor(v)}) for v in ([1.0, 1.0], [5.0, 1.0], [5.0, 5.0]))
    >>> sd_mecha.merge(n_model_stock(base, a, b), output_dtype=None)["w"].round(decimals=3)
    tensor([4.3140, 2.6570])
    """
    base = value_to_node(base)
    merged = stock.model_stock(
        *deltas_from(base, models), cos_eps=cos_eps, filter_wise=filter_wise, pairs=pairs, bounded=bounded
    )
    return linear.add_difference(base, merged)


def deltas_from(base: RecipeNode, models: tuple[RecipeNodeOrValue, ...]) -> list[RecipeNode]:
    nodes = [value_to_node(model) for model in models]
    return [node if _is_delta(node) else linear.subtract(node, base) for node in nodes]


def _is_delta(node: RecipeNode) -> bool:
    return node.merge_space is not None and node.merge_space.identifier == "delta"
