"""Adapters of several kinds as the two factors of a LoRA, exactly: every scale is multiplied in.

Only kinds that are products of small matrices have such factors; what depends on the weight itself has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
Factors = tuple[Tensor, Tensor]
"""`up` (rows, rank), and `down` (rank, columns, ...) with the kernel behind where the parts show one."""


def exact_factors(kind: str, parts: Parts) -> Factors | None:
    """The factors of a module; None where its kind has none.

    Args:
        kind: name of the kind.
        parts: those that the kind reads.
    """
    make = _MAKERS.get(kind)
    if make is None or not parts.keys().isdisjoint(("dora_scale", "magnitude")):
        return None
    return make(parts)


def _lora(parts: Parts) -> Factors:
    up, down = parts["up"].flatten(1), parts["down"]
    scale = _scale(parts, down.shape[0])
    if "mid" in parts:
        down = torch.einsum("rs...,si->ri...", parts["mid"], down.flatten(1))
    return up * scale, down


def _embedding(parts: Parts) -> Factors:
    """An embedding is looked up by row, so its LoRA lies the other way round."""
    first, second = parts["embedding_a"], parts["embedding_b"]
    return first.mT * _scale(parts, first.shape[0]), second.mT


def _loha(parts: Parts) -> Factors:
    """The rows of an elementwise product of two matrices of rank r are Kronecker products of r and r numbers."""
    first, second = (_pair(parts, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    up = torch.einsum("or,os->ors", first[0], second[0]).flatten(1)
    down = first[1][:, None] * second[1][None]
    return up * _scale(parts, parts["hada_w1_b"].shape[0]), down.flatten(0, 1)


def _lokr(parts: Parts) -> Factors:
    """The Kronecker product of two products is the product of the Kronecker products of their factors."""
    first = _whole_or_pair(parts, "lokr_w1")
    second = _whole_or_pair(parts, "lokr_w2")
    ranks = (parts[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in parts)
    rank = next(ranks, None)
    down = torch.kron(first[1].reshape(*first[1].shape, *[1] * (second[1].dim() - 2)), second[1].contiguous())
    return torch.kron(first[0], second[0].contiguous()) * (1.0 if rank is None else _scale(parts, rank)), down


def _whole_or_pair(parts: Parts, name: str) -> Factors:
    if name not in parts:
        return _pair(parts, f"{name}_a", f"{name}_b", name.replace("lokr_w", "lokr_t"))
    whole = parts[name]
    rows, columns = whole.shape[0], whole.flatten(1).shape[1]
    if rows <= columns:
        return torch.eye(rows, dtype=whole.dtype, device=whole.device), whole
    identity = torch.eye(columns, dtype=whole.dtype, device=whole.device)
    return whole.flatten(1), identity.reshape(columns, *whole.shape[1:])


def _pair(parts: Parts, left: str, right: str, core: str) -> Factors:
    """The factors of a product, with a kernel between them where there is one: then the left one is (rank, rows)."""
    if core not in parts:
        return parts[left], parts[right]
    return parts[left].mT, torch.einsum("rs...,si->ri...", parts[core], parts[right])


def _scale(parts: Parts, rank: int) -> float:
    alpha = parts.get("alpha")
    return 1.0 if alpha is None else float(alpha.reshape(())) / rank


_MAKERS: Mapping[str, Callable[[Parts], Factors]] = {
    "lora": _lora,
    "lora_embedding": _embedding,
    "loha": _loha,
    "lokr": _lokr,
}
