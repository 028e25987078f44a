"""The values that a merge method takes from around it are a part of what it is, when a merge goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from tests.faults.support import many, read
from tests.faults.test_resume import Interrupted, finish


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return many(tmp_path / "one.safetensors", 0.0, count=20, size=500)


def scaled(factor: float) -> Any:
    @merge_method(register=False, identifier="scaled")
    def scaled(a: Parameter(torch.Tensor), **kwargs: Any) -> Return(torch.Tensor):  # type: ignore[valid-type]
        if not a.is_meta and kwargs["key"] == STOP_AT[0]:
            raise Interrupted
        return a * factor

    return scaled


def scaled_within(factor: float) -> Any:
    """The same, with the factor looked up in a generator that the method makes."""
    names: dict[str, Any] = {"FACTOR": factor, "STOP_AT": STOP_AT, "Interrupted": Interrupted, "__name__": __name__}
    source = """
def scaled_within(a, **kwargs):
    if not a.is_meta and kwargs["key"] == STOP_AT[0]:
        raise Interrupted
    return sum(x * FACTOR for x in (a,))
"""
    exec(source, names)
    function = names["scaled_within"]
    function.__annotations__ = {"a": Parameter(torch.Tensor), "return": Return(torch.Tensor)}
    return merge_method(register=False, identifier="scaled_within")(function)


STOP_AT = [""]


@pytest.mark.parametrize("scaled", [scaled, scaled_within])
def test_another_value_in_the_same_program_starts_afresh(
    one: Path, tmp_path: Path, scaled: Callable[[float], Any]
) -> None:
    output = tmp_path / "out.safetensors"
    STOP_AT[0] = "k07"
    with pytest.raises(Interrupted):
        finish(scaled(2.0)(sd_mecha.model(one)), output, output_dtype=None, threads=0)
    STOP_AT[0] = ""
    finish(scaled(3.0)(sd_mecha.model(one)), output, output_dtype=None)
    before = read(one)
    assert all(torch.equal(tensor, 3 * before[key]) for key, tensor in read(output).items())
