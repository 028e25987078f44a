"""Merging after a rotation: neurons of one model are turned into the directions of another."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_finite, check_one_shape, finite_number
from sd_mecha.builtin.methods.orthogonal import Alignment, procrustes
from sd_mecha.builtin.methods.svd import cache_entry
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method


def _per_key() -> defaultdict[str, dict[str, Any]]:
    return defaultdict(dict)


@merge_method(cache_factory=_per_key)
def rotate(
    a: Parameter(StateDict[Tensor]),
    b: Parameter(StateDict[Tensor]),
    alignment: Parameter(float) = 1.0,
    alpha: Parameter(Tensor) = 0.0,
    centralization: Parameter(float) = 1.0,
    stiefel_eps: Parameter(float) = 1e-8,
    stiefel_max_iters: Parameter(int) = 100,
    **kwargs: Any,
) -> Return(Tensor):
    """Turn a model's neurons, tensor by tensor, to where those of another model lie, and blend the two there.

    Formula: rows of a tensor are neurons, with their mean taken out. Q is the orthogonal matrix that minimises
    `|a Q - b|` and, where that leaves a choice, does least otherwise. The result is
    `((1 - alpha) a + alpha b Q^T) Q^alignment`, with the mean `(1 - alignment) mean(a) + alignment mean(b)`.
    Neurons of a convolution with a kernel are its single kernels. Scalars and vectors: the plain weighted sum.

    Args:
        a: the model that is turned; weights or deltas, the same kind as `b`.
        b: the model that it is turned towards.
        alignment: any number, usually in [0, 1]: 0 stays, 1 turns all the way, a fraction turns every plane
            by that share of its angle. Where Q reflects, fractions use the best rotation without reflection.
        alpha: usually in [0, 1]: how much of `b`, turned back, is mixed in.
        centralization: usually in [0, 1]: how much of the mean is taken out first.
        stiefel_eps, stiefel_max_iters: without effect, as in sd-mecha 1; kept for its recipes.

    Use when: two fine-tunes learnt the same in different directions, so that a weighted sum cancels.
    Cost: whole tensors; one singular value decomposition on the smaller side, for fractions one eigenvalue
    decomposition. With a `cache`, Q is kept and reused for every alignment and alpha.
    Source: Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem".

    >>> a, b = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, -2.0]])
    >>> rotate.__wrapped__({"w": a}, {"w": b}, key="w", alpha=torch.tensor(0.0)).abs().round()
    tensor([[0., 1.],
            [0., 1.]])
    """
    key = kwargs["key"]
    number = finite_number("rotate", "alpha", alpha)
    check_finite("rotate", "alignment", alignment)
    check_finite("rotate", "centralization", centralization)
    check_one_shape("rotate", a[key], b[key])
    if number == 0 and alignment == 0:
        return a[key].clone()
    source, target = a[key], b[key]
    if source.is_meta or source.numel() == 0:
        return torch.empty_like(source)
    dtype = torch.promote_types(source.dtype, target.dtype)
    work = torch.promote_types(dtype, torch.float32)
    x, y, weight = source.to(work), target.to(work), alpha.to(work)
    if x.dim() < 2:
        return torch.lerp(x, y, weight).to(dtype)
    rows = neuron_shape(x)
    if weight.dim() > 0:
        weight = weight.expand(x.shape).reshape(rows)
    x, y = x.reshape(rows), y.reshape(rows)
    mix = weight if number is None else number
    # what turns is handed on and not held here: without a cache, parts of it are gone as soon as they were used
    result = _blend(x, y, _turn(x, y, centralization, cache_entry(kwargs)), alignment, mix, centralization)
    return result.to(dtype).reshape(source.shape)


def neuron_shape(a: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor whose rows are neurons; a kernel of its own for convolutions of 2 and more axes."""
    kernel = math.prod(a.shape[2:])
    if a.dim() >= 4 and kernel > 1:
        return a.shape[0] * a.shape[1], kernel
    return a.shape[0], a.shape[1] * kernel


def _turn(x: Tensor, y: Tensor, centralization: float, kept: Any) -> Alignment:
    """What turns rows of `x` to those of `y`, from `kept` where it was found before."""
    found: Alignment | None = kept.get("turn")
    fits = found is not None and kept["centralization"] == centralization and kept["shape"] == x.shape
    if found is None or not fits or found.left.device != x.device or found.left.dtype != x.dtype:
        found = procrustes(x, y, x.mean(0) * centralization, y.mean(0) * centralization)
        kept.clear()
        kept.update({"centralization": centralization, "shape": x.shape, "turn": found})
    return found


def _blend(
    x: Tensor, y: Tensor, turn: Alignment, alignment: float, alpha: float | Tensor, centralization: float
) -> Tensor:
    mean_x, mean_y = x.mean(0, keepdim=True) * centralization, y.mean(0, keepdim=True) * centralization
    mean = torch.lerp(mean_x, mean_y, alignment)
    if alignment == 1 and not isinstance(alpha, Tensor):
        # the means pass through the maps as one more row, so that no centred copy is needed
        result = turn.apply(x)
        if alpha != 0:
            result.mul_(1 - alpha).add_(y, alpha=alpha)
        return result.add_(mean - (1 - alpha) * turn.apply(mean_x) - alpha * mean_y)
    whole = turn.map if float(alignment).is_integer() else turn.map.rotation
    del turn
    turned = whole.power(alignment)
    if not isinstance(alpha, Tensor) and alpha == 0:
        del whole
        return turned.apply(x).add_(mean - turned.apply(mean_x))
    if isinstance(alpha, Tensor):
        mixed = torch.lerp(x - mean_x, whole.inverse().apply(y - mean_y), alpha)
        return turned.apply(mixed).add_(mean)
    result, shift = turned.apply(x).mul_(1 - alpha), mean - (1 - alpha) * turned.apply(mean_x)
    back_and_on = whole.inverse().then(turned)
    del whole, turned
    result.add_(back_and_on.apply(y), alpha=alpha)
    return result.add_(shift.sub_(back_and_on.apply(mean_y), alpha=alpha))
