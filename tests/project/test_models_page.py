"""docs/models.md says of every registered config what it is."""

from __future__ import annotations

import re

from docs import models_page
from sd_mecha.extensions import model_configs

TEXT = models_page.PAGE.read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    assert models_page.page() == TEXT, "run `make docs`"


def test_every_config_has_a_row() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE)
    wanted = {config.identifier for config in model_configs.get_all()} - {"singleton-mecha"}
    assert sorted(rows) == sorted(wanted)
