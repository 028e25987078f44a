"""Every golden `.mecha` recipe loads, merges to its golden numbers, or is refused where it is faulty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sd_mecha
from tests.methods import reference

ROOT = Path(__file__).parents[1] / "golden" / "recipes" / "public"
CASES: list[dict[str, Any]] = json.loads((ROOT / "manifest.json").read_text())["cases"]


ACCEPTED_ERRORS = (sd_mecha.errors.MechaError, KeyError, TypeError, ValueError, RuntimeError)


def stage(case: dict[str, Any]) -> str | None:
    """Where a case fails: None if it does not, or should not have."""
    return None if case.get("known_bug") or not case["error"] else case["error"]["stage"]


WITH_TEXT = [case for case in CASES if case["text_file"]]


def ids(cases: list[dict[str, Any]]) -> Any:
    return [pytest.param(case, id=case["id"]) for case in cases]


@pytest.fixture(autouse=True)
def _beside_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("case", ids([case for case in WITH_TEXT if stage(case) == "deserialize"]))
def test_faulty_text_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(ACCEPTED_ERRORS):
        sd_mecha.deserialize_path(ROOT / case["text_file"])


@pytest.mark.parametrize("case", ids([case for case in WITH_TEXT if stage(case) != "deserialize"]))
def test_text_loads_and_survives_a_round_trip(case: dict[str, Any]) -> None:
    recipe = sd_mecha.deserialize_path(ROOT / case["text_file"])
    assert sd_mecha.deserialize(sd_mecha.serialize(recipe, finalize=False)) == recipe


@pytest.mark.parametrize("case", ids([case for case in WITH_TEXT if stage(case) == "merge"]))
def test_recipes_that_contradict_themselves_do_not_merge(case: dict[str, Any]) -> None:
    recipe = sd_mecha.deserialize_path(ROOT / case["text_file"])
    with pytest.raises(ACCEPTED_ERRORS):
        sd_mecha.merge(recipe, strict_merge_space=case["strict_merge_space"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ids([case for case in WITH_TEXT if case["output"]]))
def test_recipe_merges_to_its_golden_numbers(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sd_mecha.deserialize_path(ROOT / case["text_file"])
    if case["id"] == "finalized_structural":  # names its models without their folder
        monkeypatch.chdir(ROOT / "models")
    got = sd_mecha.merge(recipe, strict_merge_space=case["strict_merge_space"], output_dtype=torch.float32)
    got.pop("__metadata__", None)
    expected = {key: tensor.double().numpy() for key, tensor in load_file(ROOT / case["output"]).items()}
    assert got.keys() == expected.keys()
    for key, right in {**expected, **corrected(case["id"])}.items():
        np.testing.assert_allclose(got[key].double().numpy(), right, **case["tolerance"], err_msg=key)


def corrected(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """What is right where the golden numbers are not."""
    if name not in CORRECTED:
        return {}
    a, b, c = (reference.evaluate({"model": f"models/{model}.safetensors"}, ROOT) for model in "abc")
    return CORRECTED[name](a, b, c)


MINUS, FORMULAS = reference.FORMULAS["-"], reference.FORMULAS
CORRECTED = {
    # TIES kept an entry too many, and the extended one was shrunk unasked
    "trueflag": lambda a, b, c: FORMULAS["ties_sum"](MINUS(a, c), MINUS(b, c), k=0.6, vote_sgn=True),
    "big_int": lambda a, b, c: FORMULAS["ties_sum_extended"](MINUS(a, b), MINUS(a, c), k=0.2),
    # slerp of opposite scalars
    "nested": lambda a, b, c: FORMULAS["weighted_sum"](
        FORMULAS["weighted_sum"](a, b, 0.2), FORMULAS["slerp"](b, c, 0.4), 0.5
    ),
}
