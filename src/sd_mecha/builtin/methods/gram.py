"""Geometry of n tensors that needs only their inner products: n x n numbers, however large the tensors are.

A point that is a weighted sum of the tensors has distances that follow from the Gram matrix alone, so
iterations run on n weights and the tensors themselves are read twice: once for the matrix, once for the final
sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

Gram = tuple[tuple[float, ...], ...]


def pairs(count: int) -> list[tuple[int, int]]:
    """Every unordered pair of indices, each index with itself included, in the order of `gram_matrix`."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def gram_matrix(products: Iterable[Tensor], count: int) -> Gram | None:
    """The symmetric matrix of the inner products of `pairs(count)`; None while planning, without numbers."""
    matrix = [[0.0] * count for _ in range(count)]
    for (i, j), product in zip(pairs(count), products, strict=True):
        if product.is_meta:
            return None
        matrix[i][j] = matrix[j][i] = float(product)
    return tuple(map(tuple, matrix))


def stock_factor(gram: Gram, cos_eps: float) -> float:
    """The share of the mean to keep: `n c / (1 + (n - 1) c)` for the mean cosine c of all pairs, in [0, 1].

    >>> stock_factor(((1.0, 0.0), (0.0, 1.0)), 1e-6), stock_factor(((1.0, 1.0), (1.0, 1.0)), 1e-6)
    (0.0, 1.0)
    """
    n = len(gram)
    if n == 1:
        return 1.0
    norms = [math.sqrt(gram[i][i]) for i in range(n)]
    cosines = [gram[i][j] / max(norms[i] * norms[j], cos_eps) for i, j in pairs(n) if i != j]
    cosine = min(max(sum(cosines) / len(cosines), 0.0), 1.0)
    return n * cosine / (1 + (n - 1) * cosine)


@lru_cache(maxsize=64)  # every tile of a tensor asks for the same weights
def median_weights(gram: Gram, eps: float, maxiter: int, ftol: float) -> tuple[float, ...]:
    """The weights, of sum 1, with which the tensors add up to their geometric median (Weiszfeld's iteration).

    Args:
        gram: the inner products of the tensors.
        eps: the least distance that a step divides by.
        maxiter: the number of steps at most, from the mean; 0 gives the mean.
        ftol: stop when a step changes the sum of distances by at most this share.

    >>> two_equal_one_far = ((1.0, 1.0, 9.0), (1.0, 1.0, 9.0), (9.0, 9.0, 81.0))
    >>> [round(w, 3) for w in median_weights(two_equal_one_far, 1e-6, 100, 1e-20)]
    [0.5, 0.5, 0.0]
    """
    n = len(gram)
    weights = [1 / n] * n
    distances = _distances(gram, weights)
    for _ in range(maxiter):
        pulls = [1 / max(d, eps) for d in distances]
        weights = [pull / sum(pulls) for pull in pulls]
        before, distances = sum(distances), _distances(gram, weights)
        if abs(before - sum(distances)) <= ftol * sum(distances):
            break
    return tuple(weights)


def _distances(gram: Gram, weights: list[float]) -> list[float]:
    """How far each tensor lies from the weighted sum of all."""
    n = len(gram)
    to_point = [sum(w * g for w, g in zip(weights, row, strict=True)) for row in gram]
    point = sum(w * p for w, p in zip(weights, to_point, strict=True))
    return [math.sqrt(max(gram[i][i] - 2 * to_point[i] + point, 0.0)) for i in range(n)]
