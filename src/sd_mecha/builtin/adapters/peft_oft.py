"""OFT and BOFT as PEFT stores them: the columns of a weight are rotated, in blocks or through a butterfly of blocks."""

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


def peft_boft_delta(base: Tensor, blocks: Tensor, factors: Tensor | None = None) -> Tensor:
    """Return the change of a weight whose columns go through a butterfly: each stage mixes columns further apart.

    Args:
        base: the weight; its columns, with the kernel, are as many as the blocks have.
        blocks: (stages, blocks, size, size); a rotation is the Cayley transform of half of what is skew in a block.
        factors: one for each row, afterwards.
    """
    wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))  # matrices of 16 bits cannot be inverted
    skew = (wide - wide.mT) / 2
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    rotations = torch.linalg.solve(identity + skew, identity - skew, left=False).to(blocks.dtype)
    size, rows = blocks.shape[-1], base.shape[0]
    turned = base.reshape(rows, -1)
    for stage, matrices in enumerate(rotations):
        # Halves of blocks are dealt out: those at even places come first, then those at odd ones.
        dealt = (2**stage, 2, size // 2) if len(rotations) > 1 else (1, 1, size)
        mixed = turned.reshape(rows, -1, dealt[1], dealt[0], dealt[2]).transpose(2, 3).reshape(rows, -1, size)
        mixed = torch.einsum("bij,obj->obi", matrices, mixed)
        turned = mixed.reshape(rows, -1, *dealt).transpose(2, 3).reshape(rows, -1)
    turned = turned.reshape(base.shape)
    return (turned if factors is None else turned * factors.reshape(-1, *[1] * (base.dim() - 1))) - base


def _delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    assert base is not None
    return peft_oft_delta(base, parts["oft_r"])


def _butterfly(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    assert base is not None
    return peft_boft_delta(base, parts["boft_r"], parts.get("boft_s"))


PEFT_OFT = register_adapter(
    AdapterKind(
        "peft_oft",
        {"common": {"oft_R.weight": "oft_r", "oft_R.*.weight": "oft_r"}},
        (frozenset({"oft_r"}),),
        _delta,
        base_for=frozenset({"oft_r"}),
    )
)

PEFT_BOFT = register_adapter(
    AdapterKind(
        "peft_boft",
        {"common": {"boft_R": "boft_r", "boft_R.*": "boft_r", "boft_s": "boft_s", "boft_s.*": "boft_s"}},
        (frozenset({"boft_r"}),),
        _butterfly,
        frozenset({"boft_s"}),
        base_for=frozenset({"boft_r"}),
    )
)
