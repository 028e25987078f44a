"""Exchanging the scales of the two sides of attention, such as queries and keys, in each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.permutation_spec import Axis, Group, Runs, attention_heads, map_groups
from sd_mecha.builtin.methods.permutations import SD1, SDXL, channels_of
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method

SINGULAR = 1e-12
"""Heads whose channels are linearly dependent, up to this share of the largest eigenvalue, stay as they are."""


@merge_method(is_interface=True)
def balance_attention(a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(Tensor):
    """Give queries the scales of keys and the reverse, likewise values and the projection after them.

    Formula: in each head, with biases as one more column, `Q' = A Q` and `K' = A^-1 K`, where A is the
    symmetric positive matrix with `A Q Q^T A = K K^T`. Then `Q'^T K' = Q^T K`, so that attention is the same,
    and `K' K'^T = Q Q^T`. Applied twice, it gives the model back. Other tensors stay, as do
    heads with a channel that is a combination of others, for which no such A exists.

    Args:
        a: a checkpoint of Stable Diffusion 1 (sd1-ldm) or XL (sdxl-sgm); its averages (`model_ema`) stay.

    Use when: testing how much a merge depends on the scales that training happened to leave in attention.
    Cost: whole tensors, two to four at a time; two eigenvalue decompositions per head, in float64.
    Source: the equation is that of the geometric mean of positive matrices, Pusz & Woronowicz 1975.

    >>> [implementation.identifier for implementation, _ in balance_attention.interface.candidates]
    ['balance_attention_sdxl_sgm', 'balance_attention_sd1_ldm']
    """


class _ByHeads:
    @staticmethod
    def map_keys(builder: Any) -> None:
        map_groups(builder, attention_heads)


@merge_method(implements=balance_attention)
class balance_attention_sdxl_sgm(_ByHeads):
    """Exchange scales within the attention of a Stable Diffusion XL checkpoint; see `balance_attention`."""

    def __call__(self, a: Parameter(StateDict[Tensor], model_config=SDXL), **kwargs: Any) -> Return(
        Tensor, model_config=SDXL
    ):
        return balanced(a, kwargs["key_relation"].outputs, attention_heads(SDXL).get(kwargs["key"]))


@merge_method(implements=balance_attention)
class balance_attention_sd1_ldm(_ByHeads):
    """Exchange scales within the attention of a Stable Diffusion 1 checkpoint; see `balance_attention`."""

    def __call__(self, a: Parameter(StateDict[Tensor], model_config=SD1), **kwargs: Any) -> Return(
        Tensor, model_config=SD1
    ):
        return balanced(a, kwargs["key_relation"].outputs, attention_heads(SD1).get(kwargs["key"]))


def balanced(a: Mapping[str, Tensor], keys: tuple[str, ...], group: Group | None) -> dict[str, Tensor]:
    """The tensors of a group with the scales of both sides exchanged, head by head."""
    tensors = {key: a[key].clone() for key in keys}
    if group is None or any(tensor.is_meta for tensor in tensors.values()):
        return tensors
    for runs in group.runs:
        forth, back = exchange(_gram(tensors, runs.left, runs), _gram(tensors, runs.right, runs))
        for axes, map_ in ((runs.left, forth), (runs.right, back)):
            for axis in axes:
                channels = channels_of(tensors[axis.key], axis, runs)
                moved = (map_ @ channels.to(map_.dtype)).to(channels.dtype).flatten(0, 1)
                place = tensors[axis.key].narrow(axis.dim, axis.start, len(moved)).movedim(axis.dim, 0)
                place.copy_(moved.reshape(place.shape))
    return tensors


def _gram(tensors: Mapping[str, Tensor], axes: tuple[Axis, ...], runs: Runs) -> Tensor:
    """Products of the channels of each head with each other, over all tensors of one side."""
    channels = torch.cat([channels_of(tensors[axis.key], axis, runs).double() for axis in axes], -1)
    return channels @ channels.mT


def exchange(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric positive A with `A left A = right`, and its inverse; identities where either is singular.

    >>> forth, back = exchange(torch.tensor([[4.0]]), torch.tensor([[9.0]]))
    >>> round(forth.item(), 6), round(back.item(), 6)
    (1.5, 0.666667)
    """
    root, root_inverse, regular = _roots(left)
    middle, middle_inverse, also = _roots(root @ right @ root)
    identity = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    usable = (regular & also)[..., None, None]
    forth, back = root_inverse @ middle @ root_inverse, root @ middle_inverse @ root
    return torch.where(usable, forth, identity), torch.where(usable, back, identity)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Square root and its inverse of symmetric positive matrices, and which of them are not singular."""
    values, vectors = torch.linalg.eigh(gram)
    regular = values[..., 0] > SINGULAR * values[..., -1]
    roots = values.clamp(min=0).sqrt()
    scaled = vectors * roots[..., None, :], vectors / roots.clamp(min=torch.finfo(gram.dtype).tiny)[..., None, :]
    return scaled[0] @ vectors.mT, scaled[1] @ vectors.mT, regular
