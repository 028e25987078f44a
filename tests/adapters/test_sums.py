"""Several adapters on one model: their changes are added up without being made, and come out the same."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.recipes.nodes import RecipeNode
from tests.adapters.makers import drawn

ROWS, COLUMNS = 1500, 512  # several tiles
ALPHAS = (0.5, -2.0, 0.0, 1.0)


def stored(number: int, keys: tuple[str, ...] = ("proj",)) -> dict[str, Tensor]:
    """A LoRA of its own rank, with an alpha."""
    rank, of = number + 1, str(number)
    parts: dict[str, Tensor] = {}
    for key in keys:
        parts[f"{key}.lora_up.weight"] = drawn(ROWS, rank, of=of)
        parts[f"{key}.lora_down.weight"] = drawn(rank, COLUMNS, of=of)
        parts[f"{key}.alpha"] = torch.tensor(2.0)
    return parts


def delta(number: int) -> Tensor:
    parts = stored(number)
    return 2.0 / (number + 1) * (parts["proj.lora_up.weight"].double() @ parts["proj.lora_down.weight"].double())


BASE = {"proj.weight": drawn(ROWS, COLUMNS), "other.weight": drawn(3, 4)}


def stacked(*numbers: int) -> RecipeNode:
    recipe: RecipeNode = sd_mecha.model(BASE)
    for number in numbers:
        recipe = sd_mecha.apply_adapter(recipe, stored(number), alpha=ALPHAS[number])
    return recipe


def result(recipe: RecipeNode, **options: Any) -> Tensor:
    found = sd_mecha.merge(recipe, **{"output_dtype": None, "threads": 0, **options})
    assert found is not None
    value: Tensor = found["proj.weight"]
    return value


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numbers", [n for r in (1, 2, 4) for n in itertools.combinations(range(4), r)])
def test_each_adds_its_share(numbers: tuple[int, ...]) -> None:
    expected = BASE["proj.weight"].double() + sum(ALPHAS[n] * delta(n) for n in numbers)
    close(result(stacked(*numbers)), expected)


@pytest.mark.parametrize("options", [{"threads": 2}, {"total_buffer_size": 0}, {"total_buffer_size": 1 << 21}])
def test_bits_depend_on_neither_budget_nor_threads(options: dict[str, Any]) -> None:
    assert torch.equal(result(stacked(0, 1, 3)), result(stacked(0, 1, 3), **options))


def test_what_is_needed_elsewhere_is_not_added_to() -> None:
    weight = BASE["proj.weight"].double()
    base = sd_mecha.model(BASE)
    changed = stacked(0)
    twice = sd_mecha.apply_adapter(changed, stored(1))
    close(result(sd_mecha.weighted_sum(base, changed, alpha=0.25)), weight + 0.25 * 0.5 * delta(0))
    close(result(sd_mecha.weighted_sum(changed, twice, alpha=0.25)), weight + 0.5 * delta(0) + 0.25 * delta(1))
    adapter: Any = sd_mecha.extensions.merge_methods.resolve("adapter_delta")(sd_mecha.model(stored(0)), base)
    both = sd_mecha.add_difference(base, adapter, alpha=1.0) + 2.0 * adapter
    found = sd_mecha.merge(both, output_dtype=None)
    assert found is not None
    close(found["proj.weight"], weight + 3 * delta(0))


def test_a_mask_and_a_full_difference_between_factors() -> None:
    difference = {"proj.diff": drawn(ROWS, COLUMNS, of="diff")}
    mask = sd_mecha.model({"proj.weight": drawn(ROWS, COLUMNS, of="mask")}, merge_space="param")
    recipe = sd_mecha.apply_adapter(sd_mecha.apply_adapter(stacked(0), difference), stored(1), alpha=mask)
    expected = BASE["proj.weight"].double() + 0.5 * delta(0) + difference["proj.diff"].double()
    close(result(recipe), expected + drawn(ROWS, COLUMNS, of="mask").double() * delta(1))


def test_an_alpha_that_is_not_finite_is_refused() -> None:
    with pytest.raises(sd_mecha.errors.ParameterError, match=r"add_difference.*alpha"):
        result(sd_mecha.apply_adapter(BASE, stored(0), alpha=float("inf")))


def test_layers_of_one_shape_share_a_template() -> None:
    keys = tuple(f"blocks.{number}.proj" for number in range(10))
    base = {f"{key}.weight": drawn(ROWS, COLUMNS, of=key) for key in keys}
    recipe = sd_mecha.apply_adapter(base, stored(2, keys))
    with sd_mecha.plan(recipe) as plan:
        assert len(plan.templates) == 1
        assert len(plan.programs) == len(keys)
    found = sd_mecha.merge(recipe, output_dtype=None)
    assert found is not None
    for key in keys:
        close(found[f"{key}.weight"], base[f"{key}.weight"].double() + delta(2))


def test_planning_does_not_load_the_compiler_of_torch(tmp_path: Path) -> None:
    sd_mecha.merge(sd_mecha.model(BASE), output=tmp_path / "base.safetensors")
    sd_mecha.merge(sd_mecha.model(stored(0)), output=tmp_path / "lora.safetensors")
    code = (
        "import sys, sd_mecha\n"
        "sd_mecha.plan(sd_mecha.apply_adapter(*sys.argv[1:])).close()\n"
        "print('sympy' in sys.modules)"
    )
    paths = [str(tmp_path / name) for name in ("base.safetensors", "lora.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
