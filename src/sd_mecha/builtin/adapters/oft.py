"""OFT and BOFT: the rows of a weight are rotated, in blocks or through a butterfly of blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_mecha.builtin.adapters.common import ALPHA
from sd_mecha.extensions.adapters import AdapterKind, Shape, register_adapter


def rotations(blocks: Tensor, bound: Tensor | None = None) -> Tensor:
    """Return the Cayley transform of the skew-symmetric part of each block: orthogonal matrices.

    Args:
        blocks: (..., size, size).
        bound: the largest norm that all blocks together may have; they are shortened to it. None or 0: none.

    >>> rotations(torch.zeros(1, 2, 2))
    tensor([[[1., 0.],
             [0., 1.]]])
    """
    wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))  # matrices of 16 bits cannot be inverted
    skew = wide - wide.mT
    if bound is not None:
        limit = bound.reshape(()).to(wide)
        norm = torch.linalg.vector_norm(skew) + 1e-8
        skew = torch.where((limit > 0) & (norm > limit), skew * (limit / norm), skew)
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    turned: Tensor = (identity + skew) @ torch.linalg.inv(identity - skew)
    return turned.to(blocks.dtype)


def oft_delta(base: Tensor, blocks: Tensor, rescale: Tensor | None = None, bound: Tensor | None = None) -> Tensor:
    """Return the change of a weight whose rows are rotated block by block.

    Args:
        base: the weight, of `blocks x size` rows.
        blocks: (blocks, size, size); see `rotations`.
        rescale: a factor for each row afterwards.
        bound: see `rotations`.
    """
    rows = base.reshape(*blocks.shape[:2], -1)
    turned = (rotations(blocks, bound).mT @ rows).reshape(base.shape)
    return _rescaled(turned, rescale) - base


def boft_delta(base: Tensor, blocks: Tensor, rescale: Tensor | None = None, bound: Tensor | None = None) -> Tensor:
    """Return the change of a weight whose rows are rotated through a butterfly: each stage mixes rows further apart.

    Args:
        base: the weight, of `blocks x size` rows.
        blocks: (stages, blocks, size, size); see `rotations`.
        rescale: a factor for each row afterwards.
        bound: see `rotations`.
    """
    turned = base.reshape(base.shape[0], -1)
    size = blocks.shape[-1]
    for stage, matrices in enumerate(rotations(blocks, bound)):
        apart = 2**stage * (size // 2)
        width = turned.shape[1]
        mixed = turned.reshape(-1, 2, apart, width).transpose(1, 2).reshape(-1, size, width)
        turned = (matrices @ mixed).reshape(-1, apart, 2, width).transpose(1, 2).reshape(-1, width)
    return _rescaled(turned.reshape(base.shape), rescale) - base


def _rescaled(weight: Tensor, factors: Tensor | None) -> Tensor:
    return weight if factors is None else weight * factors.reshape(-1, *[1] * (weight.dim() - 1))


def _delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    assert base is not None
    blocks, alpha = parts["oft_blocks"], parts.get("alpha")
    turn = boft_delta if blocks.dim() == 4 else oft_delta
    # what trainers store as alpha is the bound for one row
    return turn(base, blocks, parts.get("rescale"), None if alpha is None else alpha * base.shape[0])


OFT = register_adapter(
    AdapterKind(
        "oft",
        {"common": ALPHA | {"oft_blocks": "oft_blocks", "rescale": "rescale"}},
        (frozenset({"oft_blocks"}),),
        _delta,
        frozenset({"rescale", "alpha"}),
        base_for=frozenset({"oft_blocks"}),
    )
)
