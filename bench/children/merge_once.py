"""One merge in a process of its own, under whichever release this interpreter has; prints its time as JSON.

Argument: JSON with `method`, `inputs`, `output`, `times` and, if any, `options` of the merge.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import sd_mecha

SEED = 1  # 1.1.8 draws other numbers for it; what is left out is as much


def add_difference(a: Any, b: Any, c: Any) -> Any:
    return a + (b - c)


def train_difference(a: Any, b: Any, c: Any) -> Any:
    return sd_mecha.add_difference(a, b, c, alpha=sd_mecha.train_difference_mask(a, b, c, alpha=1.0))


def dropped(base: Any, *models: Any, della_eps: float) -> Any:
    deltas = [model - base for model in models]
    return base + sd_mecha.ties_sum_with_dropout(*deltas, probability=0.9, della_eps=della_eps, seed=SEED)


def rotate(*models: Any, alignment: float) -> Any:
    # the method itself: what 1.1.8 offers under the name `sd_mecha.rotate` cannot be called
    return sd_mecha.extensions.merge_methods.resolve("rotate")(*models, alignment=alignment)


def ties(base: Any, *models: Any, k: float) -> Any:
    return base + sd_mecha.ties_sum(*(model - base for model in models), k=k)


def nested(base: Any, *models: Any) -> Any:
    """Twelve methods on top of each other: a quarter of the models each, and what others made of theirs."""
    quarters = [models[i::4] for i in range(4)]
    sparse, dropped_out, stock = ([model - base for model in quarter] for quarter in quarters[:3])
    trimmed = base + sd_mecha.ties_sum(*sparse, k=0.2)
    della = base + sd_mecha.ties_sum_with_dropout(*dropped_out, probability=0.5, della_eps=0.2, seed=SEED)
    averaged = base + sd_mecha.model_stock(*stock)
    median = sd_mecha.geometric_median(*quarters[3])
    mean = sd_mecha.n_average(*models)
    between = sd_mecha.slerp(trimmed, della, alpha=0.3)
    cosine = sd_mecha.add_cosine_a(averaged, mean, alpha=0.5)
    beyond = base + sd_mecha.perpendicular_component(between - base, cosine - base)
    trained = train_difference(beyond, median, base)
    return sd_mecha.clamp(sd_mecha.weighted_sum(trained, cosine, alpha=0.4), averaged, median, mean)


def with_adapters(base: Any, *adapters: Any) -> Any:
    for adapter in adapters:
        base = sd_mecha.apply_adapter(base, adapter)
    return base


RECIPES: dict[str, Callable[..., Any]] = {
    "weighted_sum": lambda *models: sd_mecha.weighted_sum(*models, alpha=0.3),
    "add_difference": add_difference,
    "slerp": lambda *models: sd_mecha.slerp(*models, alpha=0.3),
    "n_average": lambda *models: sd_mecha.n_average(*models),
    "add_difference_ties": partial(ties, k=0.2),
    "add_ties_with_dare": lambda *models: sd_mecha.add_ties_with_dare(*models, seed=SEED),
    "dare": partial(dropped, della_eps=0.0),
    "della": partial(dropped, della_eps=0.1),
    "n_model_stock": lambda *models: sd_mecha.n_model_stock(*models),
    "geometric_median": lambda *models: sd_mecha.geometric_median(*models),
    "add_perpendicular": lambda *models: sd_mecha.add_perpendicular(*models, alpha=0.5),
    "train_difference": train_difference,
    "add_cosine_a": lambda *models: sd_mecha.add_cosine_a(*models, alpha=0.5),
    "add_cosine_b": lambda *models: sd_mecha.add_cosine_b(*models, alpha=0.5),
    "rotate": partial(rotate, alignment=1.0),
    "rotate_half": partial(rotate, alignment=0.5),
    "truncate_rank": lambda base, model: base + sd_mecha.truncate_rank(model - base, rank=8),
    "nested": nested,
    "lora": with_adapters,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    seconds = []
    for _ in range(job["times"]):
        node = RECIPES[job["method"]](*map(sd_mecha.model, job["inputs"]))
        started = time.perf_counter()
        sd_mecha.merge(node, output=job["output"], **job.get("options", {}))
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
