"""Random methods in numpy, with masks from numpy's own generator: only their distribution can be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RNG = np.random.default_rng(0)


def dropout(
    *deltas: Array,
    probability: float = 0.9,
    rescale: float = 1.0,
    overlap: float = 1.0,
    overlap_emphasis: float = 0.0,
    seed: int | None = None,
) -> Array:
    """Expected value first: q is counted from the masks' law by enumeration, not by the formula under test."""
    n, shape = len(deltas), deltas[0].shape
    phase = overlap % 2
    own = phase if phase <= 1 else 2 - phase
    masks = RNG.random((n, *shape)) >= probability
    common = RNG.random(shape) >= own
    survives = RNG.random(shape) >= probability
    everyone = RNG.random(shape) < overlap_emphasis
    one = RNG.integers(0, n, shape)
    for i in range(n):
        masks[i] = np.where(common, survives & (everyone | (one == i)), masks[i])
    q = (1 - probability) * (own + (1 - own) * (overlap_emphasis + (1 - overlap_emphasis) / n))
    if n == 1:
        masks, q = RNG.random((1, *shape)) >= probability, 1 - probability
    if q == 0:
        return np.zeros(shape)
    return np.asarray((masks * np.stack(deltas)).mean(0) / q**rescale)


def drop(delta: Array, probability: float, della_eps: float, rescale: bool) -> tuple[Array, Array]:
    """A delta with a random part left out, and the same enlarged alike with nothing left out."""
    ranks = (np.argsort(np.argsort(np.abs(delta), axis=None)) + 0.5) / max(delta.size, 1)
    chance = np.clip(probability + della_eps * (0.5 - ranks.reshape(delta.shape)), 0, 1)
    left = 1 - chance
    enlarged = delta * np.where(left > 0, 1 / np.where(left > 0, left, 1), 0) if rescale else delta
    return np.where(RNG.random(delta.shape) >= chance, enlarged, 0), enlarged


def trim_both(kept: Array, whole: Array, k: float) -> tuple[Array, Array]:
    count = max(1, round(k * kept.size))
    if count >= kept.size:
        return kept, whole
    threshold = np.sort(np.abs(kept), axis=None)[-count]
    return np.where(np.abs(kept) >= threshold, kept, 0), np.where(np.abs(whole) >= threshold, whole, 0)


def elected_parts(
    deltas: tuple[Array, ...], probability: float, della_eps: float, rescale: bool, k: float, vote_sgn: bool
) -> tuple[Array, Any]:
    """What is left of the deltas and agrees with the elected signs, and by how many each entry is divided."""
    pairs = [trim_both(*drop(delta, probability, della_eps, rescale), k) for delta in deltas]
    kept, whole = np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])
    elected = np.sign(kept.sum(0) if vote_sgn else np.sign(kept).sum(0))
    agreeing = np.where(np.sign(kept) == elected, kept, 0)
    return agreeing, np.maximum(((np.sign(whole) == elected) & (whole != 0)).sum(0), 1)
