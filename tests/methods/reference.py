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

from tests.methods import reference_dropout, reference_matrices

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
    if name in ("dropout", "rotate") and tree.get("via", "api") == "api":
        name = f"{name} helper"
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


def ties_sum_with_dropout(
    *deltas: Array,
    probability: float = 0.9,
    della_eps: float = 0.0,
    rescale: bool = True,
    k: float = 0.2,
    vote_sgn: bool = False,
    apply_stock: bool = False,
    cos_eps: float = 1e-6,
    apply_median: bool = False,
    eps: float = 1e-6,
    maxiter: int = 100,
    ftol: float = 1e-20,
    seed: int | None = None,
) -> Array:
    kept, count = reference_dropout.elected_parts(deltas, probability, della_eps, rescale, k, vote_sgn)
    if apply_median:
        return geometric_median(kept, eps, maxiter, ftol)
    return np.asarray(kept.sum(0) / count * (model_stock_ratio(kept, cos_eps) if apply_stock else 1))


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


def model_stock(*deltas: Array, cos_eps: float = 1e-6) -> Array:
    return np.asarray(np.mean(deltas, 0) * model_stock_ratio(np.stack(deltas), cos_eps))


def geometric_sum(a: Array, b: Array, alpha: Any = 0.5) -> Array:
    return np.asarray((a.astype(complex) ** (1 - alpha) * b.astype(complex) ** alpha).real)


def multiply_quotient(a: Array, b: Array, c: Array, alpha: Any = 1.0) -> Array:
    with np.errstate(all="ignore"):
        x, y = np.log(np.abs(a / c)), np.log(np.abs(b / c))
        power = alpha * np.maximum(0, -x * y) / np.maximum(np.abs(x), np.abs(y)) ** 2
        return np.where(np.nan_to_num(power) != 0, (a * (b / c).astype(complex) ** power).real, a)


def crossover(a: Array, b: Array, alpha: float = 0.5, tilt: float = 0.0) -> Array:
    if a.ndim == 0 or tilt % 2 == 1:
        return (1 - alpha) * a + alpha * b
    steps = [np.abs(np.fft.fftfreq(n, 1 / n)) / max(n // 2, 1) for n in a.shape]
    radius = np.sqrt(np.mean(np.stack(np.meshgrid(*steps, indexing="ij")) ** 2, 0))
    rises = tilt % 4 < 1 or tilt % 4 > 3
    if tilt % 2 == 0:
        passes = np.where(radius > 1 - alpha if rises else radius < 1 - alpha, 1.0, 0.0)
    else:
        slope = np.abs(1 / np.tan(tilt * np.pi / 2)) * (1 if rises else -1)
        passes = np.clip(slope * (radius - (1 - alpha if rises else alpha)) + alpha, 0, 1)
    return np.asarray(np.fft.ifftn((1 - passes) * np.fft.fftn(a) + passes * np.fft.fftn(b)).real)


def add_cosine(a: Array, b: Array, alpha: Any = 1.0, whole: bool = False) -> Array:
    x, y = a.reshape(a.shape or (1,)), b.reshape(b.shape or (1,))
    similarity = cosine((x * y).sum(0), (x * x).sum(0), (y * y).sum(0))
    if whole:
        if not x.any() or not y.any():
            return a
        similarity = (similarity + cosine((x * y).sum(), (x * x).sum(), (y * y).sum())) / 2
    weight = 1 - np.clip(similarity - alpha, 0, 1)
    return np.asarray(((1 - weight) * x + weight * y).reshape(a.shape))


def cosine(xy: Any, xx: Any, yy: Any) -> Any:
    norms = np.sqrt(xx) * np.sqrt(yy)
    return np.where(norms > 0, xy / np.where(norms > 0, norms, 1), 0)


def region(width: float, offset: float, size: int) -> list[bool]:
    """Which of `size` things lie in a range of period 1."""
    if width < 0:
        width, offset = -width, offset + width
    width, offset = min(width, 1), offset % 1 % 1  # twice: the first gives 1 for a tiny negative one
    inside = [round(offset * size) <= i < round((offset + width) * size) for i in range(size)]
    around = [round((offset + width - 1) * size) <= i < round(offset * size) for i in range(size)]
    return inside if offset + width <= 1 else [not a for a in around]


def tensor_sum(a: Array, b: Array, width: float = 0.5, offset: float = 0.0) -> Array:
    if a.ndim == 0:
        return b if width > 0.5 else a
    copied = np.asarray(region(width, offset, len(a)), bool).reshape(-1, *[1] * (a.ndim - 1))
    return np.where(copied, b, a)


def top_k_tensor_sum(a: Array, b: Array, width: float = 1.0, offset: float = 0.0) -> Array:
    if width < 0:
        width, offset = -width, offset + width
    width, offset = min(width, 1), offset % 1 % 1  # twice: the first gives 1 for a tiny negative one
    outside = offset + width > 1
    first, last = (offset + width - 1, offset) if outside else (offset, offset + width)
    sizes = np.sort(np.abs(a), axis=None)
    bounds = [-1.0 if round(at * a.size) <= 0 else sizes[round(at * a.size) - 1] for at in (first, last)]
    result = a.ravel().copy()
    for value, place in zip(np.sort(a, axis=None), np.argsort(b, axis=None, kind="stable"), strict=True):
        if (bounds[0] <= abs(value) <= bounds[1]) != outside:
            result[place] = value
    return result.reshape(a.shape)


def copy_region(
    a: Array, b: Array, c: Array | None = None, width: float = 1.0, offset: float = 0.0, top_k: bool = False
) -> Array:
    copy = top_k_tensor_sum if top_k else tensor_sum
    return copy(a, b, width, offset) if c is None else c + copy(a - c, b - c, width, offset)


def fallback(a: Model, default: Model) -> Model:
    return {**default, **a}


def add_difference_helper(a: Model, b: Model, c: Model | None = None, alpha: Any = 1.0) -> Model:
    difference = b if c is None else FORMULAS["-"](b, c)
    return fallback(FORMULAS["add_difference"](a, difference, alpha), a)


def rotate_helper(a: Model, b: Model, c: Model, **options: Any) -> Model:
    minus = FORMULAS["-"]
    return FORMULAS["add_difference"](c, FORMULAS["rotate"](minus(a, c), minus(b, c), **options))


def from_base(merge: Callable[..., Model]) -> Callable[..., Model]:
    def added(base: Model, *models: Model, alpha: float = 1.0, **options: Any) -> Model:
        deltas = [model if isinstance(model, Delta) else FORMULAS["-"](model, base) for model in models]
        return FORMULAS["add_difference"](base, merge(*deltas, **options), alpha)

    return added


FORMULAS: dict[str, Callable[..., Any]] = {
    "+": per_key(lambda a, b: a + b),
    "-": per_key(lambda a, b: a - b),
    "add_difference": per_key(lambda a, b, alpha=1.0: a + alpha * b),
    "add_difference helper": add_difference_helper,
    "add_cosine_a": per_key(add_cosine),
    "add_cosine_b": per_key(lambda a, b, alpha=1.0: add_cosine(a, b, alpha, whole=True)),
    "cast": lambda a, dtype=None, device=None: a,  # dtypes are compared by the test, not here
    "copy_region": per_key(copy_region),
    "crossover": per_key(crossover),
    "dropout": per_key(reference_dropout.dropout),
    "geometric_median": per_key(
        lambda *models, eps=1e-6, maxiter=100, ftol=1e-20: geometric_median(np.stack(models), eps, maxiter, ftol)
    ),
    "geometric_sum": per_key(geometric_sum),
    "get_device": lambda a: None,
    "get_dtype": lambda a: None,
    "model_stock": per_key(model_stock),
    "multiply_quotient": per_key(multiply_quotient),
    "rotate": per_key(reference_matrices.rotate),
    "rotate helper": rotate_helper,
    "scale": per_key(lambda a, alpha=1.0: a * alpha),
    "slerp": per_key(slerp),
    "tensor_sum": per_key(tensor_sum),
    "top_k_tensor_sum": per_key(top_k_tensor_sum),
    "ties_sum": per_key(ties_sum),
    "ties_sum_extended": per_key(ties_sum_extended),
    "ties_sum_with_dropout": per_key(ties_sum_with_dropout),
    "weighted_sum": per_key(lambda a, b, alpha=0.5: (1 - alpha) * a + alpha * b),
}
FORMULAS["add_difference_ties"] = from_base(FORMULAS["ties_sum"])
FORMULAS["add_difference_ties_extended"] = from_base(FORMULAS["ties_sum_extended"])
FORMULAS["n_model_stock"] = from_base(FORMULAS["model_stock"])
FORMULAS["dropout helper"] = lambda a, *models, alpha=0.5, **o: from_base(FORMULAS["dropout"])(
    a, *models, alpha=alpha, **o
)
FORMULAS["add_ties_with_dare"] = lambda base, *models, k=1.0, **o: from_base(FORMULAS["ties_sum_with_dropout"])(
    base, *models, k=k, **o
)
