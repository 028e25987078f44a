"""How far an adapter is from the difference of two models, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sd_mecha.adapters.sources import Source, node_of
from sd_mecha.builtin.methods.adapters import apply_adapter
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.merging import stream


@dataclass(frozen=True)
class WeightError:
    """One weight.

    Attributes:
        key: of the weight.
        difference: norm of the difference of the models.
        missed: norm of what the adapter misses of it, or does beyond it.
    """

    key: str
    difference: float
    missed: float

    @property
    def error(self) -> float:
        """The one relative to the other; infinite where the adapter changes what does not differ."""
        if self.difference:
            return self.missed / self.difference
        return math.inf if self.missed else 0.0


@dataclass(frozen=True)
class Comparison:
    """All weights, in the order of the model."""

    weights: tuple[WeightError, ...]

    @property
    def total(self) -> WeightError:
        """All weights taken as one."""
        return WeightError(
            "total",
            math.sqrt(sum(weight.difference**2 for weight in self.weights)),
            math.sqrt(sum(weight.missed**2 for weight in self.weights)),
        )

    def changed(self) -> list[WeightError]:
        """The weights that the models or the adapter change, the worst ones first."""
        found = [weight for weight in self.weights if weight.difference or weight.missed]
        return sorted(found, key=lambda weight: (-weight.error, -weight.missed))

    def __str__(self) -> str:
        lines = [f"{w.error:8.4f}  {w.difference:12.5g}  {w.key}" for w in [*self.changed(), self.total]]
        return "\n".join([f"{'error':>8}  {'difference':>12}  weight", *lines])


def compare_adapter(
    adapter: Source, tuned: Source, base: Source, *, device: str | torch.device = "cpu", strict: bool = True
) -> Comparison:
    """Tell how far an adapter is from the difference of two models.

    Args:
        adapter: of any kind that `apply_adapter` reads: a path, a state dict or a recipe.
        tuned, base: the models, in the same way.
        device: where to compute.
        strict: whether modules that have no place in the base are an error.

    Returns:
        The errors, which print as a table; see `Comparison`.

    Raises:
        AdapterError: it is no adapter, or for another architecture.
        PlanError: the models are of different architectures, or shapes.

    >>> tuned, base = {"a.weight": torch.eye(2)}, {"a.weight": torch.zeros(2, 2)}
    >>> half = {"a.diff": torch.eye(2) / 2}
    >>> compare_adapter(half, tuned, base).total.error
    0.5
    """
    whole, start = node_of(tuned), node_of(base)
    applied = apply_adapter(start, node_of(adapter), strict=strict)
    norms: Any = _norms(whole, start, applied)
    found = {}
    options: Mapping[str, Any] = {
        "merge_device": device,
        "output_dtype": None,
        "strict_merge_space": None,
        "threads": 0,
        "tqdm": None,
    }
    for key, pair in stream(norms, **options):
        found[key] = WeightError(key, *map(float, pair))
    return Comparison(tuple(found.values()))


@merge_method(register=False)
def _norms(
    tuned: Parameter(Tensor, "weight"),  # type: ignore[valid-type]
    base: Parameter(Tensor, "weight"),  # type: ignore[valid-type]
    applied: Parameter(Tensor, "weight"),  # type: ignore[valid-type]
) -> Return(Tensor, "param"):  # type: ignore[valid-type]
    """The norms of the difference of the models, and of what the adapter misses of it."""
    wide = torch.promote_types(tuned.dtype, torch.float32)
    difference, missed = (tuned.to(wide) - other.to(wide) for other in (base, applied))
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in (difference, missed)]
    return torch.stack(norms).to(tuned.dtype)
