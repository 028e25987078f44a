"""Paths between orthonormal frames, the points of a Stiefel manifold."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_mecha.builtin.methods.angles import Angles


def stiefel_interpolate(a: Tensor, b: Tensor, t: float, eps: float = 1e-8, max_iters: int = 100) -> Tensor:
    """A point on the shortest path between two orthonormal frames, by Zimmermann's iteration (arXiv 1604.05054).

    Args:
        a: the frame at t = 0: a tall matrix with orthonormal columns.
        b: the frame at t = 1, of the same shape.
        t: where on the path.
        eps: stop when the part of the path that leaves the frames' span for good is smaller.
        max_iters: at most this many rounds.
    """
    p = a.shape[1]
    overlap = a.mT @ b
    outside, rest = torch.linalg.qr(b - a @ overlap)
    columns = torch.cat([overlap, rest])
    full = torch.linalg.qr(columns, mode="complete").Q
    full = torch.cat([columns, full[:, p:]], 1)
    # begin with the completion that moves least
    u, _, vh = torch.linalg.svd(full[p:, p:])
    full[:, p:] = full[:, p:] @ (u @ vh).mT
    if torch.linalg.slogdet(full).sign < 0:
        full[:, -1] *= -1
    for _ in range(max_iters):
        corner = Angles.of(full).logarithm().to(full)[p:, p:]
        if torch.linalg.matrix_norm(corner, 2) < eps:
            break
        full[:, p:] = full[:, p:] @ torch.linalg.matrix_exp(-corner)
    moved = torch.linalg.matrix_exp(t * Angles.of(full).logarithm().to(full))[:, :p]
    result: Tensor = torch.cat([a, outside], 1) @ moved
    return result
