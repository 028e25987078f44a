"""The pages on files and durability name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sd_mecha.extensions import model_formats

ROOT = Path(__file__).parents[2]


def test_the_table_of_formats_is_that_of_the_registry() -> None:
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    built_in = {f.identifier for f in model_formats.get_all() if type(f).__module__.startswith("sd_mecha.builtin.")}
    assert set(rows) == built_in


@pytest.mark.parametrize("page", ["formats.md", "durability.md"])
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    assert len(named) > 5
    for path, function in named:
        assert (ROOT / path).is_file(), path
        assert not function or f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), function
