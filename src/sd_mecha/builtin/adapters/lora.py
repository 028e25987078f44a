"""LoRA, and LoCon for convolutions: a weight changes by the product of two or three small factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sd_mecha.builtin.adapters.common import ALPHA, fitted, product, scaled
from sd_mecha.builtin.adapters.dora import decomposable
from sd_mecha.extensions.adapters import AdapterKind, Product, Shape, register_adapter


def lora_delta(up: Tensor, down: Tensor, mid: Tensor | None = None, alpha: Tensor | None = None) -> Tensor:
    """Return the change of a weight.

    Args:
        up: (outputs, rank), with dimensions of one element behind for a convolution.
        down: (rank, inputs, ...) with the kernel behind; of one element where there is a `mid`.
        mid: (rank, rank, ...) with the kernel behind, for a convolution in three factors.
        alpha: strength; the product is scaled by `alpha / rank`. Without one the scale is 1.

    Returns:
        (outputs, inputs, ...) with the kernel behind.

    >>> lora_delta(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), alpha=torch.tensor(0.5))
    tensor([[1.5000, 2.0000],
            [3.0000, 4.0000]])
    """
    up = scaled(up.flatten(1), alpha, down.shape[0])  # it is smaller than the product
    if mid is None:
        return product(up, down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return torch.einsum("or,rs...,si->oi...", up, mid, down.flatten(1))


def _delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    return fitted(lora_delta(parts["up"], parts["down"], parts.get("mid"), parts.get("alpha")), shape)


def _product(parts: Mapping[str, Tensor]) -> Product:
    down, alpha = parts["down"].flatten(1), parts.get("alpha")
    return Product(parts["up"].flatten(1), down, 1.0 if alpha is None else alpha.item() / down.shape[0])


def _bias_delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    return scaled(parts["up_bias"], parts.get("alpha"), parts["down"].shape[0]).reshape(shape)


def _embedding_delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    first, second = parts["embedding_a"], parts["embedding_b"]
    return scaled(product(second, first).mT, parts.get("alpha"), first.shape[0])


LORA = register_adapter(
    decomposable(
        "lora",
        {
            "common": ALPHA,
            "kohya": {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid"},
            "peft": {
                "lora_B.weight": "up",
                "lora_A.weight": "down",
                "lora_B.*.weight": "up",
                "lora_A.*.weight": "down",
                "lora_B": "up",
                "lora_A": "down",
            },
            "diffusers": {
                "lora.up.weight": "up",
                "lora.down.weight": "down",
                "lora_linear_layer.up.weight": "up",
                "lora_linear_layer.down.weight": "down",
                "_lora.up.weight": "up",
                "_lora.down.weight": "down",
            },
        },
        (frozenset({"up", "down"}),),
        _delta,
        frozenset({"mid", "alpha"}),
        rows={"up": 0},
        product=_product,
        not_product=frozenset({"mid"}),
    )
)

LORA_BIAS = register_adapter(
    AdapterKind(
        "lora_bias",
        {
            "common": ALPHA,
            "kohya": {"lora_up.bias": "up_bias"},
            "peft": {"lora_B.bias": "up_bias", "lora_B.*.bias": "up_bias"},
        },
        (frozenset({"up_bias", "down"}),),
        _bias_delta,
        frozenset({"alpha"}),
        parameter="bias",
    )
)

LORA_EMBEDDING = register_adapter(
    AdapterKind(
        "lora_embedding",
        {
            "common": ALPHA,
            "peft": {
                "lora_embedding_A": "embedding_a",
                "lora_embedding_B": "embedding_b",
                "lora_embedding_A.*": "embedding_a",
                "lora_embedding_B.*": "embedding_b",
            },
        },
        (frozenset({"embedding_a", "embedding_b"}),),
        _embedding_delta,
        frozenset({"alpha"}),
        rows={"embedding_a": 1},
    )
)
