"""Merges that treat a whole tensor as one vector: lengths and angles first, then elementwise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import finite_number, keep_ends, promoted
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.reductions import Dot


def smallest_sine(dtype: torch.dtype) -> float:
    """The sine below which an angle is lost in the rounding of inner products of that dtype.

    Such an angle is 0, where the weighted sum is the limit anyway, or 180 degrees, where no arc is the
    shortest.
    """
    return 1e-6 if dtype == torch.float64 else 1e-3


@merge_method(tiling="elementwise")
def slerp(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    alpha: Parameter(Tensor) = 0.5,
) -> Return(Tensor):
    """Interpolate two models along the arc between them, tensor by tensor, so that no length is lost.

    Formula: with the angle w between `a` and `b` as flat vectors and unit vectors u, v,
    `(sin((1 - alpha) w) u + sin(alpha w) v) / sin(w) * ((1 - alpha) |a| + alpha |b|)`.
    Where the angle is undefined (parallel, opposite or zero tensors) it is the plain weighted sum.

    Args:
        a: the model at alpha 0; weights or deltas, the same kind as `b`.
        b: the model at alpha 1.
        alpha: usually in [0, 1]; any other number goes on along the circle.

    Use when: a weighted sum of two distant models washes out; between close models the two hardly differ.
    Cost: two passes (three inner products of the whole tensor, then elementwise).
    Source: Shoemake 1985, "Animating rotation with quaternion curves".

    >>> import sd_mecha
    >>> a, b = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    >>> sd_mecha.merge(sd_mecha.slerp(sd_mecha.model(a), sd_mecha.model(b)), output_dtype=None)["w"]
    tensor([1.4142, 1.4142])
    """
    a, b = promoted(a, b)
    number = finite_number("slerp", "alpha", alpha)
    if number == 0.0:
        return a.clone()
    if number == 1.0:
        return b.clone()

    aa, bb, ab = yield Dot(a, a), Dot(b, b), Dot(a, b)
    t = number if number is not None else alpha.to(a)
    weight_a, weight_b = _arc_weights(aa.item(), bb.item(), ab.item(), t, smallest_sine(a.dtype))
    # with their dtype given: a plain number would pass through float32
    of_a, of_b = (torch.as_tensor(w, dtype=a.dtype, device=a.device) for w in (weight_a, weight_b))
    result = torch.mul(a, of_a).addcmul_(b, of_b)
    return result if number is not None else keep_ends(alpha.to(a), a, b, result)


def _arc_weights(aa: float, bb: float, ab: float, t: Any, smallest: float) -> tuple[Any, Any]:
    """What two vectors weigh at `t` (a number, or one for each element) on the arc between them.

    The few numbers of a whole tensor are worked out in Python: a tensor operation on a single number takes as
    long as one on thousands.
    """
    norm_a, norm_b = math.sqrt(aa), math.sqrt(bb)
    cosine = max(-1.0, min(1.0, ab / (norm_a * norm_b))) if norm_a * norm_b else math.nan
    sine = math.sqrt((1 - cosine) * (1 + cosine))
    if not sine > smallest:  # nor where it is NaN, that is for tensors of zeros
        return 1 - t, t
    angle = math.atan2(sine, cosine)
    norm = norm_a + t * (norm_b - norm_a)
    sin = torch.sin if isinstance(t, Tensor) else math.sin
    return sin((1 - t) * angle) * norm / (sine * norm_a), sin(t * angle) * norm / (sine * norm_b)


@merge_method(tiling="elementwise")
def perpendicular_component(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
) -> Return(Tensor):
    """Take the part of `b` that is orthogonal to `a`, tensor by tensor: what only `b` holds.

    Formula: `b - (a . b) / (a . a) * a`; zeros where `a` is zero.

    Args:
        a: the direction to leave out, usually a delta.
        b: the model or delta to take apart, of the same kind.

    Use when: a delta should be added without repeating what another one already does; see
    `add_perpendicular`.
    Cost: two passes (two inner products of the whole tensor, then elementwise).
    Source: Gram-Schmidt orthogonalisation.

    >>> import sd_mecha
    >>> a, b = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([4.0, 0.0])}
    >>> part = sd_mecha.perpendicular_component(sd_mecha.model(a), sd_mecha.model(b))
    >>> sd_mecha.merge(part, output_dtype=None)["w"]
    tensor([ 2., -2.])
    """
    a, b = promoted(a, b)
    aa, ab = yield Dot(a, a), Dot(a, b)
    if aa == 0:
        return torch.zeros_like(b)
    return torch.addcmul(b, a, -(ab / aa).to(a))
