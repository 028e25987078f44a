"""Merges in the frequency domain. A Fourier transform needs the entire tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sd_mecha.builtin.methods.common import check_finite, check_one_shape, check_range, promoted
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method

STEEPEST = 1e30
"""A slope that is a step for all purposes, and finite in float32."""


@merge_method
def crossover(
    a: Parameter(Tensor),
    b: Parameter(Tensor),
    alpha: Parameter(float) = 0.5,
    tilt: Parameter(float) = 0.0,
) -> Return(Tensor):
    """Take the low frequencies of one model and the high frequencies of the other, along all dimensions.

    Formula: `a + F^-1(m * F(b - a))`, F the Fourier transform over all dimensions and m a filter of the radial
    frequency r, from 0 (constant) to 1 (highest along every dimension). The filter is a line, clipped to [0, 1] and
    turned by `tilt` quarter turns. It rises through m = alpha at `r = 1 - alpha` for a tilt below 1 or above 3 (b has
    the high frequencies), falls through it at `r = alpha` for a tilt between (b has the low ones), and is alpha
    everywhere at 1 and 3 (`weighted_sum`). At tilt 0 it is a step up at `r = 1 - alpha`; at tilt 2 exactly a step
    down, at `r = 1 - alpha` too. A scalar has no frequencies: it is the weighted sum.

    Args:
        a: the model at alpha 0; weights or deltas, the same kind as `b`.
        b: the model at alpha 1.
        alpha: in [0, 1]; the share of the frequencies that come from `b`; exactly `a` at 0 and exactly `b` at 1.
        tilt: any number, of period 4; how the two are blended around the crossover.

    Use when: coarse structure of one model should carry the detail of another. The order of neurons is arbitrary, so
    the result depends on it.
    Cost: entire tensors, O(n log n), in float32 or better; about four times the tensor.
    Source: an operator of the image-model merging community; the audio crossover filter.

    >>> a, b = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, -3.0, 3.0, 5.0])
    >>> crossover.__wrapped__(a, b, 0.6)  # the mean of a, and the detail of b
    tensor([ 2., -4.,  2.,  4.])
    """
    check_range("crossover", "alpha", alpha, 0, 1)
    check_finite("crossover", "tilt", tilt)
    check_one_shape("crossover", a, b)
    a, b = promoted(a, b)
    if alpha == 0 or a.numel() == 0:
        return a.clone()
    if alpha == 1:
        return b.clone()
    if a.dim() == 0 or tilt % 2 == 1:
        return torch.lerp(a, b, alpha)
    wide = torch.promote_types(a.dtype, torch.float32)
    spectrum = torch.fft.rfftn(torch.sub(b.to(wide), a))
    spectrum.mul_(_filter(_radius(a.shape, wide, a.device), alpha, tilt))
    return torch.fft.irfftn(spectrum, s=a.shape).add_(a).to(a.dtype)


def _radius(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The radial frequency of each entry of the half spectrum of a real tensor."""
    squares = torch.zeros((), dtype=dtype, device=device)
    for dim, size in enumerate(shape):
        last = dim == len(shape) - 1
        steps = torch.arange(size // 2 + 1 if last else size, dtype=dtype, device=device)
        steps = torch.minimum(steps, size - steps) / max(size // 2, 1)
        squares = squares + steps.square_().view(-1, *[1] * (len(shape) - 1 - dim))
    return squares.div_(len(shape)).sqrt_()


def _filter(radius: Tensor, alpha: float, tilt: float) -> Tensor:
    """How much of `b` passes at each radius; overwrites it."""
    turn = tilt % 4
    rises = turn < 1 or turn > 3
    if turn in (0, 2):
        return (radius > 1 - alpha if rises else radius < 1 - alpha).to(radius.dtype)
    centre = 1 - alpha if rises else alpha
    slope = min(abs(1 / math.tan(turn * math.pi / 2)), STEEPEST)
    return radius.sub_(centre).mul_(slope if rises else -slope).add_(alpha).clamp_(0, 1)
