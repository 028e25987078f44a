"""Merge spaces and symbols."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sd_mecha.errors import DuplicateNameError
from sd_mecha.extensions import merge_spaces
from sd_mecha.extensions.merge_spaces import MergeSpace, MergeSpaceSymbol, get_identifiers, resolve

pytestmark = pytest.mark.usefixtures("no_plugins")


@pytest.fixture
def temperature() -> Iterator[MergeSpace]:
    yield merge_spaces.register_merge_space("temperature")
    merge_spaces._registry.remove("temperature")


def test_built_in_spaces_come_first(temperature: MergeSpace) -> None:
    assert [space.identifier for space in merge_spaces.get_all()] == [
        "weight",
        "delta",
        "param",
        "temperature",
    ]


def test_spaces_are_equal_by_name() -> None:
    assert MergeSpace("weight") == resolve("weight")
    assert resolve(resolve("weight")) is resolve("weight")
    assert len({MergeSpace("weight"), resolve("weight"), resolve("delta")}) == 2


def test_spaces_are_frozen() -> None:
    with pytest.raises(AttributeError):
        resolve("weight").identifier = "other"  # type: ignore[misc]


def test_unknown_space_suggests() -> None:
    with pytest.raises(KeyError, match="'weigt'; did you mean 'weight'"):
        resolve("weigt")


def test_duplicate_space() -> None:
    with pytest.raises(DuplicateNameError, match="weight"):
        merge_spaces.register_merge_space("weight")


@pytest.mark.parametrize(
    ("spaces", "expected"),
    [
        ("delta", ["delta"]),
        (MergeSpace("delta"), ["delta"]),
        ({MergeSpace("param"), MergeSpace("weight")}, ["weight", "param"]),
        (["param", "delta"], ["delta", "param"]),
        (MergeSpaceSymbol("param", MergeSpace("weight")), ["weight", "param"]),
        (MergeSpaceSymbol(), ["weight", "delta", "param"]),
        ({MergeSpace("unregistered")}, ["unregistered"]),
    ],
)
def test_identifiers_are_in_registered_order(spaces: Any, expected: list[str]) -> None:
    assert get_identifiers(spaces) == expected


def test_identifiers_of_nonsense() -> None:
    with pytest.raises(TypeError, match="None"):
        get_identifiers(None)  # type: ignore[arg-type]


def test_open_symbol_sees_spaces_registered_later() -> None:
    symbol = MergeSpaceSymbol()
    assert len(symbol.merge_spaces) == 3
    space = merge_spaces.register_merge_space("later")
    try:
        assert space in symbol.merge_spaces
    finally:
        merge_spaces._registry.remove("later")


def test_symbols_are_variables_not_values() -> None:
    one, other = MergeSpaceSymbol("weight"), MergeSpaceSymbol("weight")
    assert one.merge_spaces == other.merge_spaces
    assert one != other
    assert len({one, other}) == 2
