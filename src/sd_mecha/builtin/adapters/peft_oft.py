"""OFT as PEFT stores it: the columns of a weight are rotated, block by block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_mecha.extensions.adapters import AdapterKind, Shape, register_adapter

NEUMANN_TERMS = 5
"""PEFT's default: the Cayley transform is a power series that ends before the fifth power."""


def skew_matrices(vectors: Tensor) -> Tensor:
    """Return skew-symmetric matrices from what stands above their diagonals.

    Args:
        vectors: (matrices, size * (size - 1) / 2), row by row.

    >>> skew_matrices(torch.tensor([[2.0]]))
    tensor([[[ 0.,  2.],
             [-2.,  0.]]])
    """
    size = round((1 + (1 + 8 * vectors.shape[1]) ** 0.5) / 2)
    rows, columns = torch.triu_indices(size, size, 1)
    upper = vectors.new_zeros(vectors.shape[0], size, size)
    upper[:, rows, columns] = vectors
    return upper - upper.mT


def peft_oft_delta(base: Tensor, vectors: Tensor) -> Tensor:
    """Return the change of a weight.

    Args:
        base: the weight; its columns, with the kernel, are as many as the blocks have.
        vectors: (blocks, size * (size - 1) / 2), see `skew_matrices`; one for all blocks where there is one only.
    """
    skew = skew_matrices(vectors)
    power = identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    rotation = identity
    for term in range(1, NEUMANN_TERMS):
        power = power @ skew
        rotation = rotation + (2 * power if term < NEUMANN_TERMS - 1 else power)
    blocks = base.reshape(base.shape[0], -1, skew.shape[-1])
    return torch.einsum("bij,obj->obi", rotation.expand(blocks.shape[1], -1, -1), blocks).reshape(base.shape) - base


def _delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    assert base is not None
    return peft_oft_delta(base, parts["oft_r"])


PEFT_OFT = register_adapter(
    AdapterKind(
        "peft_oft",
        {"common": {"oft_R.weight": "oft_r", "oft_R.*.weight": "oft_r"}},
        (frozenset({"oft_r"}),),
        _delta,
        base_for=frozenset({"oft_r"}),
    )
)
