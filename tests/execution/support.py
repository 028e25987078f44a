"""What the tests of the engine share: chosen tiles, watched inputs, and a plain evaluation to compare with.

A `Term` is a recipe together with what it must give, computed on entire tensors by the shortest formula.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import sd_mecha
from sd_mecha import merging
from sd_mecha.execution import run, stages
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.recipes.nodes import RecipeNode

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *FLOAT8)


@contextmanager
def tiles(largest: int, shared_from: int = 1 << 22) -> Iterator[None]:
    """Let tiles have at most `largest` elements, and share tensors of more than `shared_from` between workers."""
    options = merging.run_options
    with (
        patch.object(merging, "run_options", lambda o: replace(options(o), cpu_tile=largest)),
        patch.object(run, "CUDA_TILE", largest),
        patch.object(stages, "SHARED_FROM", shared_from),
    ):
        yield


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Reproducible values that fp8 can hold without overflow."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def file_bytes(recipe: Any, path: Path, **options: Any) -> bytes:
    """The bytes of the file that a merge writes."""
    sd_mecha.merge(recipe, output=path, tqdm=None, **options)
    return path.read_bytes()


def tensors(merged: Any) -> dict[str, Tensor]:
    """A result without its metadata."""
    return {key: value for key, value in merged.items() if isinstance(value, Tensor)}


def merged(recipe: Any, **options: Any) -> dict[str, Tensor]:
    """Merge into memory, in the dtype of the computation."""
    return tensors(sd_mecha.merge(recipe, **{"output_dtype": None, "tqdm": None, **options}))


@contextmanager
def counted_reads(reader: type) -> Iterator[dict[str, int]]:
    """Bytes that readers of that class read, by key."""
    counts: dict[str, int] = {}
    lock = threading.Lock()
    read_into = reader.read_into  # type: ignore[attr-defined]

    def counting(self: Any, name: str, start: int, buffer: memoryview) -> None:
        with lock:
            counts[name] = counts.get(name, 0) + len(buffer)
        read_into(self, name, start, buffer)

    with patch.object(reader, "read_into", counting):
        yield counts


def make(fn: Any = None, **options: Any) -> Any:
    """A merge method that nobody else sees."""
    return merge_method(register=False, **options) if fn is None else merge_method(register=False)(fn)


class Calls:
    """What methods were called with, from any thread."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def add(self, **facts: Any) -> None:
        with self._lock:
            self.seen.append(facts)

    def real(self) -> list[dict[str, Any]]:
        """Calls on values, not those of planning."""
        return [c for c in self.seen if not c.get("planning")]

    def of(self, name: str) -> list[Any]:
        return [c[name] for c in self.real()]


def planning(*tensors: Tensor) -> bool:
    return any(t.is_meta or t.numel() == 1 for t in tensors)


def threads_alive() -> set[str]:
    """Names of this library's threads."""
    return {t.name for t in threading.enumerate() if t.name.startswith("sd-mecha")}


# --- recipes with their values ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    node: RecipeNode
    values: Mapping[str, Tensor]
    space: str = "weight"

    def map(self, node: RecipeNode, fn: Callable[..., Tensor], *others: Term, space: str | None = None) -> Term:
        values = {k: fn(v, *(o.values[k] for o in others)) for k, v in self.values.items()}
        return Term(node, values, space or self.space)


def model_term(values: Mapping[str, Tensor]) -> Term:
    return Term(sd_mecha.model(dict(values)), {k: v.float() for k, v in values.items()})


@merge_method(register=False)
def centred(a: Parameter(Tensor)) -> Return(Tensor):
    """Sees entire tensors: every element depends on all others."""
    return a - a.double().mean().to(a.dtype) if a.numel() else a.clone()


@merge_method(register=False, tiling="rows")
def unit_rows(a: Parameter(Tensor)) -> Return(Tensor):
    """Divides each row by its largest magnitude."""
    if a.dim() < 2 or not a.numel():
        return a.clone()
    flat = a.flatten(1)
    return (flat / flat.abs().amax(1, keepdim=True).clamp(min=1e-6)).reshape(a.shape)


def _slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    x, y = a.double(), b.double()
    nx, ny = x.norm(), y.norm()
    cosine = ((x * y).sum() / (nx * ny)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    if not sine > 1e-3:
        return torch.lerp(a, b, t)
    arc = torch.sin((1 - t) * angle) / sine * (x / nx) + torch.sin(t * angle) / sine * (y / ny)
    return (arc * ((1 - t) * nx + t * ny)).float()


def _perpendicular(a: Tensor, b: Tensor) -> Tensor:
    x, y = a.double(), b.double()
    square = (x * x).sum()
    return (y - (x * y).sum() / square * x).float() if square else torch.zeros_like(b)


def _ties(*deltas: Tensor, k: float) -> Tensor:
    kept = []
    for d in deltas:
        count = max(1, round(k * d.numel()))
        least = d.abs().flatten().sort(descending=True).values[count - 1] if d.numel() else 0
        kept.append(torch.where(d.abs() >= least, d, 0.0))
    sign = torch.sign(sum(torch.sign(d) for d in kept))
    agreeing = [torch.where(torch.sign(d) == sign, d, 0.0) for d in kept]
    count = sum((d != 0).float() for d in agreeing)
    return torch.where(count == 0, 0.0, sum(agreeing) / count)


def weighted_sum(x: Term, y: Term, t: float = 0.3) -> Term:
    return x.map(sd_mecha.weighted_sum(x.node, y.node, alpha=t), lambda a, b: torch.lerp(a, b, t), y)


def slerp(x: Term, y: Term, t: float = 0.3) -> Term:
    return x.map(sd_mecha.slerp(x.node, y.node, alpha=t), lambda a, b: _slerp(a, b, t), y)


def perpendicular(x: Term, y: Term) -> Term:
    return x.map(sd_mecha.perpendicular_component(x.node, y.node), _perpendicular, y)


def average(*terms: Term) -> Term:
    node = sd_mecha.n_average(*(t.node for t in terms))
    return terms[0].map(node, lambda *v: torch.stack(v).double().mean(0).float(), *terms[1:])


def difference(x: Term, y: Term) -> Term:
    return x.map(x.node - y.node, torch.sub, y, space="delta")


def plus(x: Term, delta: Term) -> Term:
    return x.map(x.node + delta.node, torch.add, delta)


def ties(*deltas: Term, k: float = 0.4) -> Term:
    node = sd_mecha.ties_sum(*(d.node for d in deltas), k=k)
    return deltas[0].map(node, lambda *v: _ties(*v, k=k), *deltas[1:])


def centre(x: Term) -> Term:
    return x.map(centred(x.node), centred.__wrapped__)


def rows(x: Term) -> Term:
    return x.map(unit_rows(x.node), unit_rows.__wrapped__)


def half(x: Term) -> Term:
    return x.map(x.node.to(dtype="float16"), lambda a: a.half().float())


def stacked(*terms: Term) -> Term:
    return terms[0].map(sd_mecha.stack(*(t.node for t in terms)), lambda *v: torch.stack(v), *terms[1:])
