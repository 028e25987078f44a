"""DoRA: a change of direction, with a length of its own for each row or column of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from sd_mecha.extensions.adapters import AdapterKind, Delta, ProductOf, Shape

PARTS = frozenset({"dora_scale", "magnitude"})
"""The lengths: `dora_scale` says by its shape whether of rows or of columns, `magnitude` is always of rows."""

LYCORIS = {"dora_scale": "dora_scale"}
PEFT = {
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.*.weight": "magnitude",
    "lora_magnitude_vector.*": "magnitude",
}


def dora_delta(delta: Tensor, base: Tensor, lengths: Tensor, by_columns: bool = False) -> Tensor:
    """Return the change of a weight.

    Args:
        delta: the change before the lengths are set.
        base: the weight.
        lengths: those that the rows, or the columns, of the changed weight get; as many elements as there are.
        by_columns: whether they are of columns, that is of input channels.

    >>> dora_delta(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.tensor([10.0]))
    tensor([[3., 4.]])
    """
    changed = base + delta
    axis = 1 if by_columns else 0
    others = [dim for dim in range(changed.dim()) if dim != axis]
    norms: Tensor = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    wanted = lengths.reshape([-1 if dim == axis else 1 for dim in range(changed.dim())])
    # as the programs do it, a row of zeros gets no direction
    return changed * (wanted / (norms + torch.finfo(changed.dtype).eps)) - base


def with_lengths(delta: Delta) -> Delta:
    """A delta that obeys the lengths, where the parts have any."""

    def obeying(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
        change = delta(parts, shape, base)
        lengths = parts.get("magnitude", parts.get("dora_scale"))
        if lengths is None:
            return change
        assert base is not None  # the kind asks for it
        if lengths.numel() not in base.shape[:2]:
            raise ValueError(
                f"its lengths of shape {tuple(lengths.shape)} are of neither the rows nor the columns of a weight of "
                f"shape {tuple(base.shape)}"
            )
        return dora_delta(change, base, lengths, "magnitude" not in parts and _by_columns(lengths, base))

    return obeying


def _by_columns(lengths: Tensor, base: Tensor) -> bool:
    """Whether lengths of this shape are of columns: (1, columns, ...) rather than (rows, 1, ...)."""
    return base.dim() > 1 and lengths.dim() > 1 and lengths.shape[0] == 1 and lengths.numel() == base.shape[1] != 1


def decomposable(
    name: str,
    spellings: Mapping[str, Mapping[str, str]],
    needs: tuple[frozenset[str], ...],
    delta: Delta,
    may: frozenset[str],
    rows: Mapping[str, int] = MappingProxyType({}),
    whole_for: frozenset[str] = frozenset(),
    product: ProductOf | None = None,
    not_product: frozenset[str] = frozenset(),
) -> AdapterKind:
    """A kind of low rank that may have lengths as well."""
    named = dict(spellings)
    for style, endings in (("kohya", LYCORIS), ("peft", PEFT)):
        named[style] = {**named.get(style, {}), **endings}
    lengthened = with_lengths(delta)
    return AdapterKind(
        name, named, needs, lengthened, may | PARTS, base_for=PARTS, rows=rows, whole_for=whole_for,
        product=product, not_product=not_product,
    )  # fmt: skip
