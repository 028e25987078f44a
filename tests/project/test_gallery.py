"""docs/methods.md is what `make docs` would write, and shows every method that computes something."""

from __future__ import annotations

import re

import pytest
import torch

import sd_mecha
from docs import gallery
from docs.panels import PICTURES, Points

TEXT = gallery.PAGE.read_text(encoding="utf-8")
NO_PICTURE = {"get_rank_from_ratio", "get_dtype", "get_device"}
"""Methods of pictured families whose result is no tensor."""


def test_the_page_is_current() -> None:
    assert gallery.page() == TEXT, "run `make docs`"


def test_every_built_in_method_appears() -> None:
    missing = [name for name, info in sd_mecha.methods().items() if info.is_builtin and f"`{name}`" not in TEXT]
    headings = set(re.findall(r"^### (\w+)$", TEXT, re.MULTILINE))
    assert set(missing) <= headings


def test_every_image_exists_and_is_small_and_none_is_left_over() -> None:
    named = {gallery.PAGE.parent / path for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT)}
    assert named == set(gallery.IMAGES.iterdir())
    for image in named:
        assert image.read_bytes().startswith(b"\x89PNG")
        assert image.stat().st_size < 40_000, image.name


def test_every_link_leads_somewhere() -> None:
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^##+ (.+)$", TEXT, re.MULTILINE)}
    inside = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert len(inside) > 40
    assert set(inside) <= anchors


@pytest.mark.parametrize("family", PICTURES)
def test_a_picture_shows_what_every_method_of_its_family_does(family: str) -> None:
    panels = PICTURES[family].panels()
    for panel in panels:
        assert panel.tensor.dim() == 2, panel.title
        assert torch.isfinite(panel.tensor).all(), panel.title
        assert isinstance(panel, Points) == (panel.tensor.shape[1] == 2), panel.title
    infos = gallery.families()[family]
    assert {panel.method for panel in panels} - {""} == {info.identifier for info in infos} - NO_PICTURE


def test_families_without_a_picture_compute_nothing_or_only_gather() -> None:
    of_files = {"extraction", "adapters", "permutations", "attention_balance"}  # of one architecture, or of adapters
    assert set(gallery.families()) - set(PICTURES) == {"select", "block_weights", "exchange"} | of_files


def test_the_reading_order_names_families_that_exist() -> None:
    assert set(gallery.ORDER) == set(gallery.families())
