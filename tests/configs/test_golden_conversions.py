"""Conversions and LoRAs against numbers of 1.1.8: a choice of the cases that `make reference` runs in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.configs import golden_cases

ROOT = Path(__file__).parents[1] / "golden" / "configs"


@pytest.mark.parametrize("case", golden_cases.cases(ROOT / "conversion_cases"))
def test_conversion(case: dict[str, Any]) -> None:
    golden_cases.check_conversion(case, ROOT / "conversion_cases")


@pytest.mark.parametrize("case", golden_cases.cases(ROOT / "lora"))
def test_lora(case: dict[str, Any]) -> None:
    golden_cases.check_lora(case, ROOT / "lora")
