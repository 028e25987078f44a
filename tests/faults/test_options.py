"""Options out of range: refused at once, by name, with what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import OptionError
from tests.faults.support import refused

WRONG: list[tuple[str, Any, str]] = [
    ("threads", -1, "non-negative integer or None, got -1"),
    ("threads", 1.5, "non-negative integer or None, got 1.5"),
    ("threads", True, "non-negative integer or None"),
    ("threads", "2", "non-negative integer or None"),
    ("total_buffer_size", -1, "not negative"),
    ("total_buffer_size", float("nan"), "finite"),
    ("total_buffer_size", float("inf"), "finite"),
    ("total_buffer_size", "512MB", "number of bytes"),
    ("merge_device", "gpu", "is not a device"),
    ("merge_device", "meta", "no values"),
    ("merge_device", "mps", "'cpu'"),
    ("merge_device", 1.5, "is not a device"),
    ("output_device", "nowhere", "is not a device"),
    ("merge_dtype", "float17", "did you mean 'float16'"),
    ("output_dtype", 16, "int 16"),
    ("cache", 3, "int"),
    ("cache", {"a": {}}, "recipe nodes"),
    ("tqdm", 3, "int"),
    ("output", 3, "int"),
    ("output", (), "tuple"),
]


@pytest.mark.parametrize(("option", "value", "says"), WRONG)
def test_a_value_out_of_range(a: Path, option: str, value: Any, says: str) -> None:
    with refused(OptionError, ValueError, RuntimeError, says=[says]):
        sd_mecha.merge(sd_mecha.model(a), **{option: value})
    if option not in ("merge_dtype", "output_dtype"):
        with refused(OptionError, says=[option]):
            sd_mecha.merge(sd_mecha.model(a), **{option: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(a: Path) -> None:
    with refused(OptionError, says=["merge_device='cuda'", "no CUDA device", "'cpu'"]):
        sd_mecha.merge(sd_mecha.model(a), merge_device="cuda")


def test_an_unknown_option_lists_the_known_ones(a: Path) -> None:
    for call in (sd_mecha.plan, lambda r, **o: next(sd_mecha.stream(r, **o)), lambda r, **o: sd_mecha.Defaults(**o)):
        with refused(OptionError, says=["'threds'", "threads"]):
            call(sd_mecha.model(a), threds=2)


@pytest.mark.parametrize("size", [0, 1, 2**10, 1e6])
@pytest.mark.parametrize("threads", [0, 3])
def test_any_budget_is_enough(a: Path, b: Path, size: float, threads: int) -> None:
    recipe = sd_mecha.slerp(sd_mecha.weighted_sum(a, b), b)
    merged = sd_mecha.merge(recipe, total_buffer_size=size, threads=threads)
    expected = sd_mecha.merge(recipe)
    assert torch.equal(merged["w"], expected["w"])
    assert torch.equal(merged["b"], expected["b"])


def test_outputs_of_merge_many_must_differ(tmp_path: Path, a: Path) -> None:
    twice = {tmp_path / "o.safetensors": a, str(tmp_path / "x" / ".." / "o.safetensors"): a}
    with refused(OptionError, says=["o.safetensors"]):
        sd_mecha.merge_many(twice)
    for call in (sd_mecha.merge_many, lambda *args, **o: next(sd_mecha.stream(a, **o))):
        with refused(OptionError, says=["output"]):
            call({}, output=tmp_path / "o.safetensors")
