"""Matrix methods in numpy, the long way: full decompositions, whole spaces, eigenvalues in the complex plane."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rotate(a: Array, b: Array, alignment: float = 1.0, alpha: Any = 0.0, centralization: float = 1.0) -> Array:
    if a.ndim < 2:
        return (1 - alpha) * a + alpha * b
    kernel = math.prod(a.shape[2:])
    columns = kernel if a.ndim >= 4 and kernel > 1 else a.shape[1] * kernel
    x, y = a.reshape(-1, columns), b.reshape(-1, columns)
    mean_x, mean_y = x.mean(0) * centralization, y.mean(0) * centralization
    q, proper = nearest_orthogonal((x - mean_x).T @ (y - mean_y))
    if not float(alignment).is_integer():
        q = proper
    weight = np.broadcast_to(alpha, a.shape).reshape(x.shape)
    mixed = (1 - weight) * (x - mean_x) + weight * ((y - mean_y) @ q.T)
    turned = mixed @ power(q, alignment) + (1 - alignment) * mean_x + alignment * mean_y
    return np.asarray(turned.reshape(a.shape))


def nearest_orthogonal(m: Array) -> tuple[Array, Array]:
    """The orthogonal matrix with the largest inner product with `m` that turns the rest of the space least, and the
    one that does not reflect."""
    u, s, vt = np.linalg.svd(m)
    rank = int((s > 1e-10 * max(float(s.max(initial=0.0)), 1e-300)).sum())
    known, free = u[:, :rank] @ vt[:rank], len(s) - rank
    wu, _, wvt = np.linalg.svd(u[:, rank:].T @ vt[rank:].T)
    left, right = u[:, rank:] @ wu, vt[rank:].T @ wvt.T
    q = known + left @ right.T
    last = (left[:, -1], right[:, -1]) if free else (u[:, -1], vt[-1])
    proper = q if np.linalg.det(q) > 0 else q - 2 * np.outer(*last)
    return (proper if free == 1 else q), proper


def power(q: Array, exponent: float) -> Array:
    if float(exponent).is_integer():
        return np.asarray(np.linalg.matrix_power(q, int(exponent)))
    values, vectors = np.linalg.eig(q)
    turned = np.exp(1j * np.angle(values) * exponent)
    return np.asarray((vectors @ np.diag(turned) @ np.linalg.inv(vectors)).real)
