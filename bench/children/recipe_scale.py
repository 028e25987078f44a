"""Build, print, save, load and plan one very large recipe; prints the times as JSON.

Arguments: the kind of recipe, and the path of a small model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import sd_mecha

CHAIN = 100_000
LEVELS = 64
MODELS = 10_000


def chain(path: str) -> Any:
    node: Any = sd_mecha.model(path)
    other = sd_mecha.model(path, merge_space="weight")
    for _ in range(CHAIN):
        node = sd_mecha.weighted_sum(node, other, alpha=0.5)
    return node


def ladder(path: str) -> Any:
    node: Any = sd_mecha.model(path)
    for _ in range(LEVELS):
        node = sd_mecha.weighted_sum(node, node)
    return node


def average_of_files(path: str) -> Any:
    return sd_mecha.n_average(*(sd_mecha.model(f"{number}-{path}") for number in range(MODELS)))


def average_in_memory(path: str) -> Any:
    return sd_mecha.n_average(*(sd_mecha.model({"weight": torch.zeros(4)}) for _ in range(MODELS)))


KINDS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "chain": (chain, ("repr", "serialize", "plan")),
    "ladder": (ladder, ("repr", "serialize", "plan")),
    # Names need no files until they are merged; models in memory have no names to save.
    "average_of_files": (average_of_files, ("repr", "serialize")),
    "average_in_memory": (average_in_memory, ("repr", "plan")),
}


def main() -> None:
    build, steps = KINDS[sys.argv[1]]
    sd_mecha.weighted_sum(sd_mecha.model(sys.argv[2]), 0.5)  # the first call loads the built-ins
    node, built = timed(lambda: build(sys.argv[2]))
    seconds = {"build": built}
    if "repr" in steps:
        _, seconds["repr"] = timed(lambda: repr(node))
    if "serialize" in steps:
        text, seconds["serialize"] = timed(lambda: sd_mecha.serialize(node, finalize=False))
        again, seconds["deserialize"] = timed(lambda: sd_mecha.deserialize(text))
        assert again == node
    if "plan" in steps:
        _, seconds["plan"] = timed(lambda: sd_mecha.plan(node))
    print(json.dumps({"seconds": seconds}))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
