"""One merge in a process of its own, under whichever release this interpreter has; prints its time as JSON.

Argument: JSON with `method`, `inputs`, `output` and `times`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import sd_mecha


def recipe(method: str, inputs: list[str]) -> Any:
    models = [sd_mecha.model(path) for path in inputs]
    if method == "weighted_sum":
        return sd_mecha.weighted_sum(*models, alpha=0.3)
    if method == "add_difference":
        a, b, c = models
        return a + (b - c)
    if method == "slerp":
        return sd_mecha.slerp(*models, alpha=0.3)
    if method == "n_average":
        return sd_mecha.n_average(*models)
    raise ValueError(method)


def main() -> None:
    job = json.loads(sys.argv[1])
    seconds = []
    for _ in range(job["times"]):
        node = recipe(job["method"], job["inputs"])
        started = time.perf_counter()
        sd_mecha.merge(node, output=job["output"])
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
