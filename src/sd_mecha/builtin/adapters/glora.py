"""GLoRA: a weight changes by a low-rank matrix and by its own product with another one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sd_mecha.builtin.adapters.common import ALPHA, fitted, scaled
from sd_mecha.extensions.adapters import AdapterKind, Shape, register_adapter


def glora_delta(base: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Return the change of a weight.

    Args:
        base: the weight.
        a1, a2: (inputs, rank) and (rank, inputs): the weight is multiplied by their product from the right.
        b1, b2: (outputs, rank) and (rank, inputs, ...), as the factors of a LoRA.
        alpha: strength; both are scaled by `alpha / rank`. Without one the scale is 1.

    The first files of this kind have the factors the other way round, (rank, inputs) and (inputs, rank), (rank,
    inputs) and (outputs, rank); their shapes tell.

    >>> import torch
    >>> one = torch.ones(1, 1)
    >>> glora_delta(torch.tensor([[3.0]]), one, one, one, torch.tensor([[0.5]]))
    tensor([[3.5000]])
    """
    if not (a1.shape[0] == base.shape[1] and a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]):
        a1, a2, b1, b2 = a2, a1, b2, b1
    kernel = base.shape[2:]
    own = base.movedim(1, -1) @ a1.flatten(1) @ a2.flatten(1)  # what follows the columns is a kernel
    added = b1.flatten(1) @ b2.flatten(1)
    return scaled(own.movedim(-1, 1) + added.reshape(base.shape[0], base.shape[1], *kernel), alpha, a2.shape[0])


def _delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    assert base is not None
    a1, a2, b1, b2 = (parts[name] for name in ("a1", "a2", "b1", "b2"))
    return fitted(glora_delta(base, a1, a2, b1, b2, parts.get("alpha")), shape)


_FACTORS = frozenset({"a1", "a2", "b1", "b2"})

GLORA = register_adapter(
    AdapterKind(
        "glora",
        {"common": ALPHA | {f"{name}.weight": name for name in sorted(_FACTORS)}},
        (_FACTORS,),
        _delta,
        frozenset({"alpha"}),
        base_for=_FACTORS,
    )
)
