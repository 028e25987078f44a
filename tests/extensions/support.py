"""What tests of the sockets share: merging small models exactly, and registering things for one test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import sd_mecha
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.model_configs import ModelConfig, ModelConfigImpl


def run(recipe: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Merge in the calling thread, exactly and in any merge space; the tensors alone."""
    given = {"threads": 0, "output_dtype": None, "strict_merge_space": None, "tqdm": None, **options}
    merged = sd_mecha.merge(recipe, **given)
    assert merged is not None
    return {key: value for key, value in merged.items() if key != "__metadata__"}


def numbers(recipe: Any, **options: Any) -> dict[str, Any]:
    """The merged tensors as plain lists and numbers."""
    return {key: tensor.tolist() for key, tensor in run(recipe, **options).items()}


def model(_config: str | None = None, _space: str | None = "weight", **values: Any) -> Any:
    """A model in memory; each key a number or a list of numbers."""
    tensors = {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
    return sd_mecha.model(tensors, _config, _space)


def config(identifier: str, *keys: str, handler: Any = None, **components: Mapping[str, Any]) -> ModelConfig:
    """A config of some keys, all in the component `main`, or of whole components."""
    parts = {**({"main": dict.fromkeys(keys)} if keys else {}), **components}
    return ModelConfigImpl(identifier, parts, handler)


@contextmanager
def registered(*configs: ModelConfig) -> Iterator[None]:
    """Have some configs registered for a while."""
    done = []
    try:
        for one in configs:
            model_configs.register(one)
            done.append(one)
        yield
    finally:
        for one in done:
            model_configs.unregister(one.identifier)


@contextmanager
def removed_afterwards(*identifiers: str) -> Iterator[None]:
    """Take merge methods of these names out of the registry when the block ends."""
    from sd_mecha.extensions import merge_methods

    try:
        yield
    finally:
        for identifier in identifiers:
            if identifier in merge_methods._registry:
                merge_methods._registry.remove(identifier)
