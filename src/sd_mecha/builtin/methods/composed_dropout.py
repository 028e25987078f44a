"""Ready-made recipes that leave out a random part of what models learnt; they compute nothing."""

from __future__ import annotations

from sd_mecha.builtin.methods import dropout as methods
from sd_mecha.builtin.methods import linear
from sd_mecha.builtin.methods.composed import deltas_from
from sd_mecha.extensions.merge_methods import RecipeNodeOrValue, value_to_node
from sd_mecha.recipes.nodes import RecipeNode


def dropout(
    a: RecipeNodeOrValue,
    *models: RecipeNodeOrValue,
    probability: RecipeNodeOrValue = 0.9,
    alpha: RecipeNodeOrValue = 0.5,
    overlap: RecipeNodeOrValue = 1.0,
    overlap_emphasis: RecipeNodeOrValue = 0.0,
    seed: RecipeNodeOrValue = None,
) -> RecipeNode:
    """Add to `a` the average of several models' differences from it, a random part left out of each.

    Args:
        a: the common base, which also receives the result.
        models: fine-tunes of it; those known to be deltas are taken as they are.
        probability: the share of entries that is left out.
        alpha: how much of the merged delta is added.
        overlap, overlap_emphasis, seed: see the method `dropout`.

    >>> import sd_mecha, torch
    >>> a, b = (sd_mecha.model({"w": torch.tensor([value])}) for value in (1.0, 5.0))
    >>> sd_mecha.merge(sd_mecha.dropout(a, b, probability=0.0), output_dtype=None)["w"]
    tensor([3.])
    """
    base = value_to_node(a)
    merged = methods.dropout(
        *deltas_from(base, models),
        probability=probability,
        overlap=overlap,
        overlap_emphasis=overlap_emphasis,
        seed=seed,
    )
    return linear.add_difference(base, merged, alpha)


def add_ties_with_dare(
    base: RecipeNodeOrValue,
    *models: RecipeNodeOrValue,
    della_eps: RecipeNodeOrValue = 0.0,
    probability: RecipeNodeOrValue = 0.9,
    rescale: RecipeNodeOrValue = True,
    alpha: RecipeNodeOrValue = 1.0,
    seed: RecipeNodeOrValue = None,
    k: RecipeNodeOrValue = 1.0,
    vote_sgn: RecipeNodeOrValue = False,
    apply_stock: RecipeNodeOrValue = False,
    cos_eps: RecipeNodeOrValue = 1e-6,
    apply_median: RecipeNodeOrValue = False,
    eps: RecipeNodeOrValue = 1e-6,
    maxiter: RecipeNodeOrValue = 100,
    ftol: RecipeNodeOrValue = 1e-20,
) -> RecipeNode:
    """Add to `base` what `ties_sum_with_dropout` makes of several models' differences from it.

    Args:
        base: the common base, which also receives the result.
        models: fine-tunes of it; those known to be deltas are taken as they are.
        della_eps, probability, rescale, seed: what is left out; see `ties_sum_with_dropout`.
        alpha: how much of the merged delta is added.
        k, vote_sgn, apply_stock, cos_eps, apply_median, eps, maxiter, ftol: see `ties_sum_extended`.

    >>> import sd_mecha, torch
    >>> base, a, b = (sd_mecha.model({"w": torch.tensor([value])}) for value in (1.0, 3.0, 5.0))
    >>> sd_mecha.merge(sd_mecha.add_ties_with_dare(base, a, b, probability=0.0), output_dtype=None)["w"]
    tensor([4.])
    """
    base = value_to_node(base)
    merged = methods.ties_sum_with_dropout(
        *deltas_from(base, models),
        probability=probability,
        della_eps=della_eps,
        rescale=rescale,
        k=k,
        vote_sgn=vote_sgn,
        apply_stock=apply_stock,
        cos_eps=cos_eps,
        apply_median=apply_median,
        eps=eps,
        maxiter=maxiter,
        ftol=ftol,
        seed=seed,
    )
    return linear.add_difference(base, merged, alpha)
