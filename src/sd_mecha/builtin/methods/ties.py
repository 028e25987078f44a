"""TIES: trim each delta to its largest entries, elect a sign per entry, and merge only what agrees with it.

The trim threshold is the magnitude of one whole tensor's k-th largest entry, so both methods are streamed:
one pass to find it, one to apply it; the extended one takes another for the inner products of what was kept.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_positive, check_range, check_some, promoted
from sd_mecha.builtin.methods.gram import check_weiszfeld, gram_matrix, median_weights, pairs, stock_factors
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.reductions import Dot, KthMagnitude


@merge_method(tiling="elementwise")
def ties_sum(
    *models: Parameter(Tensor, "delta"),
    k: Parameter(float) = 1.0,
    vote_sgn: Parameter(bool) = False,
    **kwargs: Any,
) -> Return(Tensor, "delta"):
    """Merge deltas: trim small entries, elect a sign per entry, average the deltas that have it.

    Formula: keep the `round(k n)` entries of largest magnitude of each delta (at least one, and all that tie
    with the last); g = the sign that most deltas have (`vote_sgn=False`), or that has the larger total
    (`True`, as published); result = mean of the kept entries whose sign is g, 0 where there are none or the
    vote is a draw.

    Args:
        models: deltas of one base.
        k: in [0, 1]; the share of entries that each delta keeps; 0.2 is the published default. Above 1 keeps
            all.
        vote_sgn: elect the sign of the sum of entries instead of the majority of signs.

    Use when: several fine-tunes interfere with each other; `add_difference_ties` applies it to whole models.
    Cost: three passes for k below 1 (an exact radix selection, then elementwise), else one.
    Source: TIES-Merging, arXiv 2306.01708.

    >>> import sd_mecha
    >>> a, b = ({"w": torch.tensor(v)} for v in ([4.0, 1.0, -3.0], [2.0, -5.0, 0.5]))
    >>> deltas = [sd_mecha.model(d, merge_space="delta") for d in (a, b)]
    >>> recipe = sd_mecha.ties_sum(*deltas, k=0.67)
    >>> sd_mecha.merge(recipe, strict_merge_space="delta", output_dtype=None)["w"]
    tensor([ 3., -5., -3.])
    """
    check_range("ties_sum", "k", k, 0)
    check_some("ties_sum", models, "delta")
    models = promoted(*models)
    kept_share = entries_kept(k, kwargs["tile"].numel)
    if kept_share is not None:
        thresholds = yield tuple(KthMagnitude(m, kept_share) for m in models)
        models = _trim(models, thresholds)
    elected = _elected(models, vote_sgn)
    kept = _agreeing(models, elected)
    return _mean(kept, kept).mul_(elected)


@merge_method(tiling="elementwise")
def ties_sum_extended(
    *models: Parameter(Tensor, "delta"),
    k: Parameter(float) = 0.2,
    vote_sgn: Parameter(bool) = False,
    apply_stock: Parameter(bool) = False,
    apply_median: Parameter(bool) = False,
    cos_eps: Parameter(float) = 1e-6,
    eps: Parameter(float) = 1e-6,
    maxiter: Parameter(int) = 100,
    ftol: Parameter(float) = 1e-20,
    **kwargs: Any,
) -> Return(Tensor, "delta"):
    """Merge deltas as `ties_sum` does, and shrink the result by their agreement or take a geometric median.

    Formula: D_i = what `ties_sum` keeps of delta i and averages. With `apply_stock`, the mean times
    `t = n c / (1 + (n - 1) c)`, c the mean cosine of all pairs D_i, D_j, and t kept within [0, 1]. With
    `apply_median`, the point with the least sum of distances to the D_i (which `apply_stock` does not
    change).

    Args:
        models: deltas of one base.
        k: in [0, 1]; the share of entries that each delta keeps. Above 1 keeps all.
        vote_sgn: elect the sign of the sum of entries instead of the majority of signs.
        apply_stock: multiply by the model-stock factor; one model has factor 1.
        apply_median: take the geometric median; robust against outliers among the models.
        cos_eps: above 0; the least product of norms a cosine is divided by.
        eps: above 0; the least distance a median step divides by.
        maxiter: at least 0; the number of median steps at most.
        ftol: at least 0; the median stops when the sum of distances changes by a smaller share.

    Use when: TIES alone moves too far (`apply_stock`), or one of many deltas is an outlier (`apply_median`).
    Cost: as `ties_sum`, and one more pass for the inner products of all pairs.
    Source: TIES-Merging, arXiv 2306.01708; Model Stock, arXiv 2403.19522; geometric median, arXiv 1912.13445.

    >>> import sd_mecha
    >>> deltas = [sd_mecha.model({"w": torch.tensor([v, v])}, merge_space="delta") for v in (1.0, 1.0, 9.0)]
    >>> recipe = sd_mecha.ties_sum_extended(*deltas, k=1.0, apply_median=True)
    >>> sd_mecha.merge(recipe, strict_merge_space="delta", output_dtype=None)["w"].round(decimals=3)
    tensor([1., 1.])
    """
    check_range("ties_sum_extended", "k", k, 0)
    check_some("ties_sum_extended", models, "delta")
    models = promoted(*models)
    options = TiesOptions(vote_sgn, apply_stock, apply_median, cos_eps, eps, maxiter, ftol)
    options.check("ties_sum_extended")
    return (yield from merge_elected(models, models, entries_kept(k, kwargs["tile"].numel), options))


class TiesOptions(NamedTuple):
    """The parameters of `ties_sum_extended` that do not depend on the tensor."""

    vote_sgn: bool
    apply_stock: bool
    apply_median: bool
    cos_eps: float
    eps: float
    maxiter: int
    ftol: float

    def check(self, method: str) -> None:
        """Refuse values outside their ranges.

        Raises:
            ParameterError: there is one; the message names method, parameter, value and range.
        """
        check_positive(method, "cos_eps", self.cos_eps)
        check_weiszfeld(method, self.eps, self.maxiter, self.ftol)


def merge_elected(
    models: Sequence[Tensor], counted: Sequence[Tensor], kept_share: int | None, options: TiesOptions
) -> Generator[Any, Any, Tensor]:
    """Trim, elect signs and merge: the reductions and the result of `ties_sum_extended`.

    Args:
        models: the deltas, of one dtype.
        counted: what a mean divides by: the number of models whose entry here is large enough and has the
            elected sign. These are the deltas again, unless some of their entries were dropped at random.
        kept_share: how many entries of each delta are kept; None for all.
        options: everything else.
    """
    if kept_share is not None:
        thresholds = yield tuple(KthMagnitude(m, kept_share) for m in models)
        same = counted is models
        models = _trim(models, thresholds)
        counted = models if same else _trim(counted, thresholds)
    elected = _elected(models, options.vote_sgn)
    kept = _agreeing(models, elected)
    if options.apply_median and len(kept) > 1:
        gram = gram_matrix((yield tuple(Dot(kept[i], kept[j]) for i, j in pairs(len(kept)))), len(kept))
        weights = [1.0] * len(kept) if gram is None else median_weights(gram, *options[-3:])
        result = kept[0] * weights[0]
        for delta, weight in zip(kept[1:], weights[1:], strict=True):
            result.add_(delta, alpha=weight)
        return result.mul_(elected)
    result = _mean(kept, kept if counted is models else _agreeing(counted, elected))
    if options.apply_stock and len(kept) > 1:
        products = yield tuple(Dot(kept[i], kept[j]) for i, j in pairs(len(kept)))
        result.mul_(stock_factors(torch.stack(products), len(kept), options.cos_eps).to(result))
    return result.mul_(elected)


def entries_kept(share: float, numel: int) -> int | None:
    """How many entries of a delta are kept; None for all of them."""
    count = max(1, round(share * numel)) if share < 1 else numel
    return None if count >= numel else count


# Truth values are avoided below: comparing numbers in place, which gives 1.0 and 0.0, and multiplying takes a fifth
# of the time of choosing by them.


def _trim(models: Sequence[Tensor], thresholds: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(m.abs().ge_(t.to(m)).mul_(m) for m, t in zip(models, thresholds, strict=True))


def _elected(models: Sequence[Tensor], by_mass: bool) -> Tensor:
    """The sign that each entry should have; 0 where the vote is a draw."""
    votes = models[0].clone() if by_mass else torch.sign(models[0])
    for model in models[1:]:
        votes.add_(model if by_mass else torch.sign(model))
    return votes.sign_()


def _agreeing(models: Sequence[Tensor], elected: Tensor) -> list[Tensor]:
    """The magnitudes of the models' entries that have the elected sign; 0 for all others.

    Multiplied by the elected signs they are these entries again, and inner products are the same either way.
    """
    return [(m * elected).clamp_(min=0).nan_to_num_(0.0, math.inf) for m in models]


def _mean(kept: Sequence[Tensor], counted: Sequence[Tensor]) -> Tensor:
    """The sum of `kept` over the number of entries of `counted` that are not 0."""
    total, count = kept[0].clone(), counted[0].sign()
    for delta, entry in zip(kept[1:], counted[1:], strict=True):
        total.add_(delta)
        count.add_(entry.sign())
    return total.div_(count.clamp_(min=1))
