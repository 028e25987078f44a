"""Geometry of n tensors that needs only their inner products: n x n numbers, however large the tensors are.

A point that is a weighted sum of the tensors has distances that follow from the Gram matrix alone, so
iterations run on n weights and the tensors themselves are read twice: once for the matrix, once for the final
sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_positive, check_range

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


def stock_factors(
    products: Tensor, count: int, cos_eps: float, *, adjacent: bool = False, bounded: bool = True
) -> Tensor:
    """The share of the mean of `count` tensors to keep: `n c / (1 + (n - 1) c)` for their mean cosine c.

    Args:
        products: the inner products of `pairs(count)`, along the first dimension.
        count: how many tensors there are, at least two.
        cos_eps: the least product of norms that a cosine is divided by.
        adjacent: take the cosines of neighbours only, instead of all pairs.
        bounded: keep c, and with it the result, within [0, 1].

    >>> stock_factors(torch.tensor([1.0, 0.0, 1.0]), 2, 1e-6), stock_factors(torch.tensor([1.0, 1.0, 1.0]), 2, 1e-6)
    (tensor(0.), tensor(1.))
    """
    if products.dim() == 1 and products.is_cpu:
        numbers = tuple(products.tolist())
        return torch.tensor(_stock_factor(numbers, count, cos_eps, adjacent, bounded), dtype=products.dtype)
    return _stock_factors(products, count, cos_eps, adjacent, bounded)


@lru_cache(maxsize=64)  # every tile of a tensor asks for the same factor
def _stock_factor(products: tuple[float, ...], count: int, cos_eps: float, adjacent: bool, bounded: bool) -> float:
    numbers = torch.tensor(products, dtype=torch.float64)
    return float(_stock_factors(numbers, count, cos_eps, adjacent, bounded))


def _stock_factors(products: Tensor, count: int, cos_eps: float, adjacent: bool, bounded: bool) -> Tensor:
    index = {pair: k for k, pair in enumerate(pairs(count))}
    chosen = [(i, j) for i, j in index if i != j and (j == i + 1 or not adjacent)]
    first, second = ([index[pair[k], pair[k]] for pair in chosen] for k in range(2))
    # the root of a product, not the product of roots: equal tensors have cosine 1 exactly
    norms = torch.sqrt(products[first] * products[second]).clamp_(min=cos_eps)
    cosine = (products[[index[pair] for pair in chosen]] / norms).mean(0)
    if bounded:
        cosine.clamp_(0, 1)
    return count * cosine / (1 + (count - 1) * cosine)


def check_weiszfeld(method: str, eps: float, maxiter: int, ftol: float) -> None:
    """Refuse parameters that `median_weights` cannot work with.

    Raises:
        ParameterError: one is out of its range.
    """
    check_positive(method, "eps", eps)
    check_range(method, "maxiter", maxiter, 0)
    check_range(method, "ftol", ftol, 0)


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
