"""Models and adapters for the tests of this folder."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import sd_mecha
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.model_configs import ModelConfig

ENDINGS = {
    "kohya": ("lora_up.weight", "lora_down.weight"),
    "peft": ("lora_B.weight", "lora_A.weight"),
    "peft named": ("lora_B.default.weight", "lora_A.default.weight"),
    "peft bare": ("lora_B", "lora_A"),
    "diffusers": ("lora.up.weight", "lora.down.weight"),
    "diffusers linear": ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
}


def drawn(*shape: int, of: str = "") -> Tensor:
    """Random numbers, other ones for another shape or name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{shape} {of}".encode()))
    return torch.randn(shape, generator=generator)


def lora(module: str, rows: int, columns: int, rank: int = 2, style: str = "kohya") -> tuple[dict[str, Tensor], Tensor]:
    """A LoRA of one linear module, without an alpha, and the change that it stands for."""
    up, down = drawn(rows, rank, of=module), drawn(rank, columns, of=module)
    first, second = ENDINGS[style]
    return {f"{module}.{first}": up, f"{module}.{second}": down}, up @ down


def tensors_of(config: str | ModelConfig, *keys: str) -> dict[str, Tensor]:
    """Random tensors of a config, by their keys."""
    known = model_configs.resolve(config).keys()
    return {key: drawn(*(known[key].shape or ()), of=key) for key in keys}


def applied(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    config: str | None = None,
    alpha: float = 1.0,
    strict: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """The model with the adapter, by default in float32 and strictly."""
    recipe = sd_mecha.apply_adapter(sd_mecha.model(base, config), adapter, alpha=alpha, strict=strict)
    merged = sd_mecha.merge(recipe, output_dtype=options.pop("output_dtype", None), tqdm=None, **options)
    assert merged is not None
    return {key: value for key, value in merged.items() if isinstance(value, Tensor)}


def change(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], config: str | None = None) -> dict[str, Tensor]:
    """What the adapter changes, of all tensors that it changes at all."""
    found = applied(base, adapter, config)
    assert found.keys() == base.keys()
    return {key: found[key] - base[key] for key in base if not torch.equal(found[key], base[key])}
