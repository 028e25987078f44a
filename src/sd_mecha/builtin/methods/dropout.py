"""Merging deltas of which a random part is left out: what remains is enlarged, so that the mean stays.

Each delta has a mask of its own for each tensor. It follows from the seed, the key and the position of the delta
alone: neither tile size nor threads nor order change it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_finite, check_range, check_some, known_number, promoted
from sd_mecha.builtin.methods.random_bits import at_least, draw_seed, keep, uniform
from sd_mecha.builtin.methods.ties import TiesOptions, entries_kept, merge_elected
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.ranks import MagnitudeRanks, rank_of

COMMON, SURVIVES, WHOSE = -1, -2, -3
"""Streams of random numbers that belong to no single delta."""


@merge_method(tiling="elementwise", default_factories={"seed": draw_seed})
def dropout(
    *deltas: Parameter(Tensor, "delta"),
    probability: Parameter(float) = 0.9,
    rescale: Parameter(float) = 1.0,
    overlap: Parameter(float) = 1.0,
    overlap_emphasis: Parameter(float) = 0.0,
    seed: Parameter(int) = None,
    **kwargs: Any,
) -> Return(Tensor, "delta"):
    """Average deltas of which a random part is left out, enlarged so that the expected result is their mean.

    Formula: `mean(mask_i * delta_i) / q ** rescale`, where each entry of mask_i is 1 with probability q, else
    0. With independent masks q is `1 - probability`.

    Args:
        deltas: deltas of one base.
        probability: in [0, 1]; the share of entries that is left out.
        rescale: any number, usually in [0, 1]: 1 is unbiased, 0 does not enlarge what is kept.
        overlap: 1, or any odd number: each delta is masked independently. 0, or any even number: an entry is
            drawn once for all deltas, and what is kept is kept of one of them. Between: a mixture of both.
        overlap_emphasis: in [0, 1]; the share of those common draws that keep the entry of all deltas instead
            of one.
        seed: any integer; the same one gives the same masks. Without one it is drawn when the recipe is made,
            and stands in it.

    Use when: deltas are redundant, and fewer changes at once should interfere less.
    Cost: elementwise, one pass.
    Source: DARE, arXiv 2311.03099; the overlap is an addition of this library.

    >>> import sd_mecha
    >>> delta = sd_mecha.model({"w": torch.ones(100_000)}, merge_space="delta")
    >>> recipe = sd_mecha.extensions.merge_methods.resolve("dropout")(delta, probability=0.75, seed=1)
    >>> got = sd_mecha.merge(recipe, strict_merge_space="delta")["w"]
    >>> got.unique().tolist(), round(got.float().mean().item(), 1)
    ([0.0, 4.0], 1.0)
    """
    check_some("dropout", deltas, "delta")
    check_range("dropout", "probability", probability, 0, 1)
    check_range("dropout", "overlap_emphasis", overlap_emphasis, 0, 1)
    check_finite("dropout", "rescale", rescale)
    check_finite("dropout", "overlap", overlap)
    deltas = promoted(*deltas)
    n, dtype = len(deltas), deltas[0].dtype
    own = 1 - abs(1 - overlap % 2) if n > 1 else 1.0
    share = (1 - probability) * (own + (1 - own) * (overlap_emphasis + (1 - overlap_emphasis) / n))
    if share == 0:
        return torch.zeros_like(deltas[0])
    masks = _Masks(seed, kwargs["key"], kwargs["tile"].start, deltas[0], probability)
    total = torch.zeros_like(deltas[0], dtype=torch.promote_types(dtype, torch.float32))
    for position, delta in enumerate(deltas):
        mask = masks.of_one(position) if own == 1 else masks.of_several(position, n, own, overlap_emphasis)
        total.add_(keep(delta, mask))
    return total.div_(n * share**rescale).to(dtype)


@merge_method(tiling="elementwise", default_factories={"seed": draw_seed})
def ties_sum_with_dropout(
    *deltas: Parameter(Tensor, "delta"),
    probability: Parameter(Tensor) = 0.9,
    della_eps: Parameter(float) = 0.0,
    rescale: Parameter(bool) = True,
    k: Parameter(float) = 0.2,
    vote_sgn: Parameter(bool) = False,
    apply_stock: Parameter(bool) = False,
    cos_eps: Parameter(float) = 1e-6,
    apply_median: Parameter(bool) = False,
    eps: Parameter(float) = 1e-6,
    maxiter: Parameter(int) = 100,
    ftol: Parameter(float) = 1e-20,
    seed: Parameter(int) = None,
    **kwargs: Any,
) -> Return(Tensor, "delta"):
    """Leave out a random part of each delta (DARE, or DELLA), and merge the rest as `ties_sum_extended` does.

    Formula: each entry of delta i is left out with probability p, else divided by `1 - p`; what is left is
    trimmed, and signs are elected, as in `ties_sum`. The mean divides by the number of deltas that agree
    whether or not their entry was left out, so that the expected result is not inflated. p is `probability +
    della_eps * (1/2 - r)`, where r is the entry's rank by magnitude, from 0 for the smallest to 1 for the largest
    of its tensor.

    Args:
        deltas: deltas of one base.
        probability: in [0, 1]; the share of entries that is left out. A number, a dict, or a param model.
        della_eps: any number, usually in [0, 1]; how much less likely large entries are left out than small
            ones; 0 is DARE. p is kept within [0, 1].
        rescale: divide what is left by `1 - p`, which is unbiased.
        k: in [0, 1]; the share of all entries that each delta keeps at most, after the random part is gone.
        vote_sgn, apply_stock, apply_median, cos_eps, eps, maxiter, ftol: see `ties_sum_extended`.
        seed: any integer; the same one gives the same masks. Without one it is drawn when the recipe is made,
            and stands in it.

    Use when: several fine-tunes interfere; `add_ties_with_dare` applies it to whole models.
    Cost: as `ties_sum_extended`; with `della_eps` one more pass for the ranks, which are told apart to 8
    significant bits of magnitude.
    Source: DARE, arXiv 2311.03099; DELLA, arXiv 2406.11617; TIES-Merging, arXiv 2306.01708.

    >>> import sd_mecha
    >>> deltas = [sd_mecha.model({"w": torch.ones(100_000)}, merge_space="delta") for _ in range(3)]
    >>> recipe = sd_mecha.ties_sum_with_dropout(*deltas, probability=0.5, k=1.0, seed=1)
    >>> round(sd_mecha.merge(recipe, strict_merge_space="delta")["w"].float().mean().item(), 1)
    1.0
    """
    check_some("ties_sum_with_dropout", deltas, "delta")
    number = known_number(probability)
    if number is not None:
        check_range("ties_sum_with_dropout", "probability", number, 0, 1)
    check_range("ties_sum_with_dropout", "k", k, 0)
    check_finite("ties_sum_with_dropout", "della_eps", della_eps)
    options = TiesOptions(vote_sgn, apply_stock, apply_median, cos_eps, eps, maxiter, ftol)
    options.check("ties_sum_with_dropout")
    deltas = promoted(*deltas)
    tile = kwargs["tile"]
    kept: tuple[Tensor, ...] = deltas
    if number != 0 or della_eps != 0:
        chances: list[float | Tensor] = [probability if number is None else number] * len(deltas)
        if della_eps != 0:
            tables = yield tuple(MagnitudeRanks(delta) for delta in deltas)
            chances = [_by_rank(*known, della_eps) for known in zip(deltas, tables, chances, strict=True)]
        if rescale:
            deltas = tuple(delta * _enlarged(p, delta) for delta, p in zip(deltas, chances, strict=True))
        kept = tuple(
            keep(delta, _Masks(seed, kwargs["key"], tile.start, delta, p).of_one(position))
            for position, (delta, p) in enumerate(zip(deltas, chances, strict=True))
        )
    return (yield from merge_elected(kept, deltas, entries_kept(k, tile.numel), options))


def _by_rank(delta: Tensor, table: Tensor, probability: float | Tensor, della_eps: float) -> Tensor:
    """The probability of each entry to be left out, which falls with its rank."""
    if isinstance(probability, Tensor):
        return rank_of(delta, table).sub_(0.5).mul_(-della_eps).add_(probability).clamp_(0, 1)
    # worked out for each rank that there is, of which there are less than entries
    return rank_of(delta, table.sub(0.5).mul_(-della_eps).add_(probability).clamp_(0, 1))


def _enlarged(probability: float | Tensor, like: Tensor) -> float | Tensor:
    """What makes up for leaving out entries with that probability; 0 where nothing is left."""
    if isinstance(probability, Tensor):
        left = 1 - probability.to(torch.promote_types(like.dtype, torch.float32))
        return left.reciprocal_().nan_to_num_(posinf=0.0).to(like)
    return 1 / (1 - probability) if probability < 1 else 0.0


class _Masks:
    """Which entries of a tile are kept."""

    def __init__(self, seed: int | None, key: str, start: int, like: Tensor, probability: float | Tensor) -> None:
        self._where = (seed, key, start)
        self._like = like
        self._probability = probability.float() if isinstance(probability, Tensor) else probability

    def _draw(self, stream: int) -> Tensor:
        seed, key, start = self._where
        return uniform(seed, key, stream, start, self._like)

    def of_one(self, stream: int) -> Tensor:
        """Drawn from one stream: the position of a delta, which is then alone, or one that all share."""
        if isinstance(self._probability, Tensor):
            # a comparison in place gives 1.0 and 0.0, without truth values
            return self._draw(stream).ge_(self._probability).to(torch.int32).neg_()
        return at_least(*self._where[:2], stream, self._where[2], self._like, self._probability)

    @cached_property
    def _shared(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._draw(WHOSE), self.of_one(SURVIVES), self._draw(COMMON)

    def of_several(self, position: int, count: int, own: float, emphasis: float) -> Tensor:
        """Drawn for this delta alone for a share `own` of the entries, and for the rest in common with the others."""
        drawn, survives, common = self._shared
        whose = drawn - emphasis
        chosen = (whose < 0) | (whose.mul_(count / max(1 - emphasis, 1e-9)).floor_() == position)
        return torch.where(common < own, self.of_one(position), survives & _mask(chosen))


def _mask(chosen: Tensor) -> Tensor:
    return chosen.to(torch.int32).neg_()
