"""The guide to block weights works as it stands there, and names every preset and layer type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sd_mecha.extensions.curves import CURVES
from sd_mecha.extensions.layer_types import LAYER_TYPES

GUIDE = (Path(__file__).parents[2] / "docs" / "block-weights.md").read_text(encoding="utf-8")

PROSE = re.sub(r"^```.*?^```$", "", GUIDE, flags=re.MULTILINE | re.DOTALL)


def test_every_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})


def test_every_preset_is_explained() -> None:
    named = set(re.findall(r"`([^`]+)`", PROSE))
    assert {re.sub(r"([*/])\d$", r"\1k", name) for name in CURVES} <= named


def test_every_layer_type_is_named() -> None:
    named = set(re.findall(r"`(?:type:)?([^`]+)`", PROSE))
    assert {name if name in named else "." + name.partition(".")[2] for name in LAYER_TYPES} <= named
