"""Every built-in merge method obeys the laws that the table says it obeys, and breaks the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_mecha.extensions import merge_methods
from tests.methods.law_checks import LAWS
from tests.methods.laws import SHAPES, assert_same_bits
from tests.methods.row import Row
from tests.methods.table import MOVING_KEYS, ROWS

ROOT = Path(__file__).parents[2]


def cases(column: str) -> list[Any]:
    return [
        pytest.param(row, law, id=f"{row}-{law}".replace(" ", "_"))
        for row in ROWS
        for law in getattr(row, column).split()
    ]


def make(
    shape: tuple[int, ...], count: int, seed: int, whole: bool = False, strided: bool = False
) -> list[torch.Tensor]:
    """Tensors of one shape: of normally distributed numbers or of small integers, contiguous or not."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]
    if whole:
        made = [(2 * t).round() for t in made]
    if strided and shape:
        made = [
            torch.stack([t, -t], -1)[..., 0].mT.contiguous().mT if t.dim() > 1 else torch.stack([t, -t], 1)[:, 0]
            for t in made
        ]
    return made


@st.composite
def inputs(draw: st.DrawFn, row: Row) -> list[torch.Tensor]:
    shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 2**32))
    whole = not row.generic and draw(st.booleans())
    return make(shape, len(row.spaces), seed, whole, draw(st.booleans()))


@pytest.mark.parametrize(("row", "law"), cases("holds"))
def test_a_law_holds(row: Row, law: str) -> None:
    @settings(max_examples=5, database=None)
    @given(models=inputs(row))
    def check(models: list[torch.Tensor]) -> None:
        LAWS[law].check(row, models)

    check()


@pytest.mark.parametrize(("row", "law"), cases("breaks"))
def test_a_law_is_broken(row: Row, law: str) -> None:
    for seed, shape in enumerate([(6, 5), (4, 4), (5, 3, 2), (12,)]):
        models = make(shape, len(row.spaces), seed)
        positive = [m.abs() for m in models]
        all_but_one_alike = [0 * models[0], *(1 + 0.1 * m for m in models[1:-1]), 10 * models[-1]][-len(models) :]
        for candidates in (models, positive, all_but_one_alike):
            try:
                LAWS[law].check(row, candidates)
            except AssertionError:
                return
    pytest.fail(f"{row} obeys {law}, although the table denies it")


@pytest.mark.parametrize(
    ("row", "options", "index"),
    [pytest.param(row, options, index, id=f"{row}-{options}") for row in ROWS for options, index in row.ends],
)
def test_the_ends_of_a_parameter_are_inputs_bit_for_bit(row: Row, options: dict[str, Any], index: int) -> None:
    @settings(max_examples=5, database=None)
    @given(models=inputs(row))
    def check(models: list[torch.Tensor]) -> None:
        if row.variadic and not row.based:
            models = models[:1]
        assert_same_bits(row(*models, **options), models[index].contiguous())

    check()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_row_takes_a_position_on_every_law(row: Row) -> None:
    holds, breaks = row.holds.split(), row.breaks.split()
    assert not {*holds} & {*breaks}
    assert len({*holds, *breaks}) == len(holds + breaks)
    assert {*holds, *breaks} == {name for name, law in LAWS.items() if law.applies(row)}


def test_every_built_in_method_is_in_the_table() -> None:
    known = {row.name for row in ROWS if not row.recipe}
    built_in = {
        method.identifier
        for method in merge_methods.get_all()
        if method.__wrapped__.__module__.startswith("sd_mecha.builtin.methods.")
    }
    assert known | MOVING_KEYS.keys() == built_in
    for name, file in MOVING_KEYS.items():
        assert name.split("_'")[0] in (ROOT / file).read_text(), name


def test_every_ready_made_recipe_is_in_the_table() -> None:
    from sd_mecha.builtin.methods import composed, composed_dropout, copying

    known = {row.name for row in ROWS if row.recipe}
    public = {
        name
        for module in (composed, composed_dropout, copying)
        for name, value in vars(module).items()
        if callable(value)
        and value.__name__ == name
        and getattr(value, "__module__", None) == module.__name__
        and not name.startswith("_")
    }
    assert public - {"deltas_from"} <= known
