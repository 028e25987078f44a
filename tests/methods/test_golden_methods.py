"""Every golden case whose methods exist gives its golden numbers.

Where the release that made them is known to be wrong, numpy (`reference.py`) says what is right. A method
that is added later is covered as soon as it is registered, unless its cases need corrections.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sd_mecha
from tests.methods import expressions, reference
from tests.methods.test_golden_random import is_random

ROOT = Path(__file__).parents[1] / "golden" / "methods"
CASES: list[dict[str, Any]] = json.loads((ROOT / "manifest.json").read_text())["cases"]

ACCEPTED_ERRORS = (sd_mecha.errors.MechaError, TypeError, ValueError, RuntimeError)

CORRECTED = {
    # opposite vectors: an angle of almost 180 degrees was divided by the rounding error of its sine
    "slerp_009": "slerp of opposite tensors",
    # a scalar zero was written in place of every tensor
    "scale_001": "scale by 0",
    # the trim threshold was rounded to float32, which dropped entries that tie with it even at k = 1
    **{f"add_difference_ties_composed_{i:03}": "trim threshold" for i in range(1, 13)},
    # one entry too many was kept
    "add_difference_ties_extended_composed_004": "trim threshold",
    "ties_sum_extended_021": "trim threshold",
    "ties_sum_extended_023": "trim threshold",
    # the bound of a range of magnitudes was rounded to float32, so that the value it was taken from lay outside
    "copy_region_012": "range of magnitudes",
    # the map of wide matrices was not orthogonal at alignment 0 either, where it turns what alpha mixes in
    **{f"rotate_{i:03}": "wide matrices" for i in (7, 8, 11, 12)},
}
"""Cases with wrong golden numbers that the manifest does not mark, and what was wrong."""

WORKS_NOW = {
    "ties_sum_extended_020": "one delta: the model-stock factor, applied by mistake, needs two",
    "geometric_sum_015": "bfloat16",
    "crossover_022": "bfloat16",
}
"""Cases that raised, unmarked, although there is an answer."""

STILL_RAISES = {
    "get_dtype_001": "a str is no tensor that could be written",
    "get_device_001": "a str is no tensor that could be written",
    "add_difference_ties_014": "no model to merge",
    "model_stock_005": "no model to merge",
}
"""Cases that are refused, although the manifest has no error or a fault."""


def cases() -> list[Any]:
    chosen = []
    for case in CASES:
        exists = all(map(expressions.exists, expressions.names(case["expression"])))
        if exists and case["deterministic"] and not is_random(case):  # others: test_golden_random.py
            chosen.append(pytest.param(case, id=case["id"]))
    return chosen


def merged(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    result = sd_mecha.merge(
        expressions.recipe(case["expression"], ROOT),
        merge_dtype=dtype(case["merge_dtype"]),
        output_dtype=dtype(case["output_dtype"]),
        strict_merge_space=case["strict_merge_space"],
        threads=0,
        **case["merge_kwargs"],
    )
    return {key: tensor for key, tensor in result.items() if key != "__metadata__"}


def dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", cases())
def test_case(case: dict[str, Any]) -> None:
    name = case["id"]
    if name in STILL_RAISES or (case["error"] and not case["known_bug"] and name not in WORKS_NOW):
        with pytest.raises(ACCEPTED_ERRORS):
            merged(case)
        return

    got = merged(case)
    golden = {} if case["error"] else load_file(ROOT / case["output"])
    wrong = wrong_keys(case, golden)
    right = reference.evaluate(case["expression"], ROOT) if wrong else {}
    keys = golden.keys() or right.keys()
    assert got.keys() == keys
    for key in keys:
        if key in golden:
            assert got[key].dtype == golden[key].dtype, key
        expected = golden[key].double().numpy() if golden else right[key]
        if key in right and (key in wrong or not golden):
            expected = torch.tensor(right[key]).to(got[key].dtype).double().numpy()
        assert got[key].shape == expected.shape, key
        np.testing.assert_allclose(got[key].double().numpy(), expected, **tolerance(case), err_msg=key)


def tolerance(case: dict[str, Any]) -> dict[str, float]:
    """How far a result may be off; cases that raised in bfloat16 ask for more than bfloat16 can hold."""
    raised = case["id"] in WORKS_NOW and case["merge_dtype"] == "bfloat16"
    return {"rtol": 2**-6, "atol": 2**-6} if raised else case["tolerance"]


def wrong_keys(case: dict[str, Any], golden: dict[str, torch.Tensor]) -> set[str]:
    """The keys whose golden numbers (if any) are not to be reproduced."""
    if case["error"] or case["id"] in CORRECTED:
        return set(golden) or {"every key"}
    if case["known_bug"]:
        return set(case.get("known_bug_keys") or golden)
    return set()


def test_that_no_correction_is_stale() -> None:
    """A correction for a case that is gone, or that agrees with its golden numbers, only hides mistakes."""
    known = {case["id"]: case for case in CASES}
    assert CORRECTED.keys() | WORKS_NOW.keys() | STILL_RAISES.keys() <= known.keys()
    for name in CORRECTED:
        golden = load_file(ROOT / known[name]["output"])
        right = reference.evaluate(known[name]["expression"], ROOT)
        tolerance = known[name]["tolerance"]
        assert any(differs(right[key], golden[key].numpy(), tolerance) for key in golden), name


def differs(right: Any, golden: Any, tolerance: dict[str, float]) -> bool:
    return right.shape != golden.shape or not np.allclose(right, golden, **tolerance)


def test_that_cases_of_every_public_method_are_found() -> None:
    """An expression that silently counted as "not there yet" would hide all cases of its method."""
    covered = {case.values[0]["method"] for case in cases()}
    assert {"weighted_sum", "n_average", "slerp", "add_difference", "scale", "cast", "ties_sum"} <= covered
