"""The same arithmetic in numpy, written from the papers: what golden cases are checked against where the
release that they were made with is known to be wrong.

Only what those cases need is here. Everything is done in float64 on whole tensors, in the plainest way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

Array = NDArray[np.float64]
Model = dict[str, Array]


class Delta(dict[str, Array]):
    """A model that a case declares to be a delta."""


class NotCoveredError(LookupError):
    """The expression uses something that this file has no formula for."""


def evaluate(tree: Any, root: Path) -> Any:
    """The result of a golden case's expression: key -> array for models, plain values as they are."""
    if not isinstance(tree, dict):
        return tree
    if "model" in tree:
        kind = Delta if tree.get("merge_space") == "delta" else dict
        return kind({key: tensor.double().numpy() for key, tensor in load_file(root / tree["model"]).items()})
    args = [evaluate(part, root) for part in tree.get("args", [])]
    kwargs = {key: evaluate(part, root) for key, part in tree.get("kwargs", {}).items()}
    name = tree.get("method") or tree.get("op")
    # a helper and a method of one name differ; only the helper of add_difference takes a third model
    if name == "add_difference" and (len(args) == 3 or tree.get("via", "api") == "api"):
        name = "add_difference helper"
    if name not in FORMULAS:
        raise NotCoveredError(f"tests/methods/reference.py has no formula for {name or sorted(tree)}")
    return FORMULAS[name](*args, **kwargs)


def per_key(formula: Callable[..., Array]) -> Callable[..., Model]:
    """Apply a formula to the keys that all models have; scalars hold for every key."""

    def applied(*args: Any, **kwargs: Any) -> Model:
        models = [value for value in (*args, *kwargs.values()) if isinstance(value, dict)]
        keys = set.intersection(*(set(model) for model in models))

        def at(value: Any, key: str) -> Any:
            return value[key] if isinstance(value, dict) else value

        return {
            key: formula(*(at(a, key) for a in args), **{n: at(a, key) for n, a in kwargs.items()})
            for key in sorted(keys)
        }

    return applied


def slerp(a: Array, b: Array, alpha: Any = 0.5) -> Array:
    straight = (1 - alpha) * a + alpha * b
    length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
    if length_a == 0 or length_b == 0:
        return straight
    u, v = a / length_a, b / length_b
    # the angle from chord lengths: accurate at both ends, unlike the arc cosine
    angle = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    if min(angle, np.pi - angle) < 1e-7:
        return straight
    direction = (np.sin((1 - alpha) * angle) * u + np.sin(alpha * angle) * v) / np.sin(angle)
    return direction * ((1 - alpha) * length_a + alpha * length_b)


def trimmed(delta: Array, k: float) -> Array:
    count = max(1, round(k * delta.size))
    if count >= delta.size:
        return delta
    threshold = np.sort(np.abs(delta), axis=None)[-count]
    return np.where(np.abs(delta) >= threshold, delta, 0)


def agreeing(deltas: tuple[Array, ...], k: float, vote_sgn: bool) -> Array:
    kept = np.stack([trimmed(delta, k) for delta in deltas])
    elected = np.sign(kept.sum(0) if vote_sgn else np.sign(kept).sum(0))
    return np.where(np.sign(kept) == elected, kept, 0)


def mean_of_nonzero(kept: Array) -> Array:
    return np.asarray(kept.sum(0) / np.maximum((kept != 0).sum(0), 1))


def ties_sum(*deltas: Array, k: float = 1.0, vote_sgn: bool = False) -> Array:
    return mean_of_nonzero(agreeing(deltas, k, vote_sgn))


def ties_sum_extended(
    *deltas: Array,
    k: float = 0.2,
    vote_sgn: bool = False,
    apply_stock: bool = False,
    apply_median: bool = False,
    cos_eps: float = 1e-6,
    eps: float = 1e-6,
    maxiter: int = 100,
    ftol: float = 1e-20,
) -> Array:
    kept = agreeing(deltas, k, vote_sgn)
    if apply_median:
        return geometric_median(kept, eps, maxiter, ftol)
    return mean_of_nonzero(kept) * (model_stock_ratio(kept, cos_eps) if apply_stock else 1)


def geometric_median(points: Array, eps: float, maxiter: int, ftol: float) -> Array:
    def distances(point: Array) -> Array:
        return np.asarray([np.linalg.norm(p - point) for p in points])

    median = points.mean(0)
    for _ in range(maxiter):
        before = distances(median)
        pulls = 1 / np.maximum(before, eps)
        median = np.tensordot(pulls, points, 1) / pulls.sum()
        after = distances(median)
        if abs(before.sum() - after.sum()) <= ftol * after.sum():
            break
    return np.asarray(median)


def model_stock_ratio(deltas: Array, cos_eps: float) -> float:
    n = len(deltas)
    flat = [delta.ravel() for delta in deltas]
    cosines = [
        flat[i] @ flat[j] / max(np.linalg.norm(flat[i]) * np.linalg.norm(flat[j]), cos_eps)
        for i in range(n)
        for j in range(i)
    ]
    cosine = float(np.clip(np.mean(cosines), 0, 1)) if cosines else 1.0
    return n * cosine / (1 + (n - 1) * cosine)


def fallback(a: Model, default: Model) -> Model:
    return {**default, **a}


def add_difference_helper(a: Model, b: Model, c: Model | None = None, alpha: Any = 1.0) -> Model:
    difference = b if c is None else FORMULAS["-"](b, c)
    return fallback(FORMULAS["add_difference"](a, difference, alpha), a)


def with_ties(merge: Callable[..., Model]) -> Callable[..., Model]:
    def added(base: Model, *models: Model, alpha: float = 1.0, **options: Any) -> Model:
        deltas = [model if isinstance(model, Delta) else FORMULAS["-"](model, base) for model in models]
        return FORMULAS["add_difference"](base, merge(*deltas, **options), alpha)

    return added


FORMULAS: dict[str, Callable[..., Any]] = {
    "+": per_key(lambda a, b: a + b),
    "-": per_key(lambda a, b: a - b),
    "add_difference": per_key(lambda a, b, alpha=1.0: a + alpha * b),
    "add_difference helper": add_difference_helper,
    "cast": lambda a, dtype=None, device=None: a,  # dtypes are compared by the test, not here
    "get_device": lambda a: None,
    "get_dtype": lambda a: None,
    "scale": per_key(lambda a, alpha=1.0: a * alpha),
    "slerp": per_key(slerp),
    "ties_sum": per_key(ties_sum),
    "ties_sum_extended": per_key(ties_sum_extended),
    "weighted_sum": per_key(lambda a, b, alpha=0.5: (1 - alpha) * a + alpha * b),
}
FORMULAS["add_difference_ties"] = with_ties(FORMULAS["ties_sum"])
FORMULAS["add_difference_ties_extended"] = with_ties(FORMULAS["ties_sum_extended"])
