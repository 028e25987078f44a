"""Checks that configs of families share: digests of known layouts, inference, and conversions there and back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

import sd_mecha
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.model_configs import Family, ModelConfig
from sd_mecha.storage.contract import TensorEntry

Shapes = Mapping[str, tuple[int, ...]]


class Listing(NamedTuple):
    """What is known of a published layout: its number of keys, and the digest of their names and shapes.

    `name` is that of the full listing in the reference data; several configs may have the same keys.
    """

    name: str
    config: str
    keys: int
    digest: str


def digest(shapes: Shapes) -> str:
    """The SHA-256 of the sorted lines `name shape`, such as `a.b.weight 3x4`."""
    lines = sorted(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def mandatory(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {key: m.shape for key, m in config.keys().items() if not m.optional and m.shape is not None}


def optional(config: ModelConfig) -> dict[str, tuple[int, ...] | None]:
    return {key: m.shape for key, m in config.keys().items() if m.optional}


def best(shapes: Shapes) -> list[str]:
    """The identifiers of the configs that fit a file best; several where they fit equally well."""
    fits = model_configs.fits({key: TensorEntry(shape, torch.bfloat16) for key, shape in shapes.items()})
    least = min(fits.values(), default=None)
    return [config.identifier for config, fit in fits.items() if fit == least]


def thinned(shapes: Shapes, seed: int, share: float = 0.05, keep: Iterable[str] = ()) -> Shapes:
    """A random share of the keys is missing, but none of `keep`."""
    dice, kept = random.Random(seed), set(keep)
    return {key: shape for key, shape in shapes.items() if key in kept or dice.random() >= share}


def with_averages(shapes: Shapes) -> Shapes:
    """A second copy of every tensor, as trainers save moving averages."""
    return {**shapes, **{f"model_ema.{key.replace('.', '')}": shape for key, shape in shapes.items()}}


def family(name: str) -> Family[Any]:
    return next(family for family in model_configs.get_all_families() if family.name == name)


def tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for all keys."""
    dice = torch.Generator().manual_seed(seed)
    return {
        key: torch.randint(100, m.shape or (), generator=dice)
        if m.dtype == torch.int64
        else torch.randn(m.shape or (), generator=dice)
        for key, m in config.keys().items()
    }


def converted(state: Mapping[str, torch.Tensor], source: ModelConfig, target: ModelConfig) -> dict[str, torch.Tensor]:
    recipe = sd_mecha.convert(sd_mecha.model(dict(state), source.identifier), target.identifier)
    result: dict[str, Any] = sd_mecha.merge(recipe, merge_dtype=None, output_dtype=None, threads=0)
    return {key: value for key, value in result.items() if key != "__metadata__"}


def check_there_and_back(
    source: ModelConfig, target: ModelConfig, lost: Iterable[str] = (), component: str = "diffuser"
) -> None:
    """A conversion gives all keys of the network that the target must have, and the way back gives the same bits.

    Args:
        lost: keys that have no place in the target.
        component: that of the network.
    """
    state = tensors(source)
    there = converted(state, source, target)
    assert {key: tuple(tensor.shape) for key, tensor in there.items()} == {
        key: m.shape for key, m in target.components()[component].keys().items() if not m.optional or key in there
    }
    back = converted(there, target, source)
    assert state.keys() - back.keys() == set(lost)
    for key, tensor in back.items():
        assert tensor.shape == state[key].shape, key
        assert torch.equal(tensor, state[key]), key
