"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha import units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512MB", 512_000_000),
        ("512 mb", 512_000_000),
        ("512M", 512 << 20),
        ("2GiB", 2 << 30),
        (".5k", 512),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1..5MB", "12 potatoes", "1e6", "inf", "1 M B"])
def test_other_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="512MB"):
        units.parse_size(text)


@given(st.integers(0, 10**15))
def test_a_size_survives_being_written_up_to_its_rounding(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == pytest.approx(size, rel=0.006)


@given(st.integers(0, 10**15))
def test_a_written_size_is_short(size: int) -> None:
    assert len(units.format_size(size)) <= 7
