"""Inputs in memory are never modified, and results are always memory of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sd_mecha
from sd_mecha.recipes.nodes import RecipeNode

Recipe = Callable[[RecipeNode, RecipeNode], RecipeNode]

RECIPES: dict[str, Recipe] = {
    "copy": lambda a, b: a,
    "weighted_sum": sd_mecha.weighted_sum,
    "weighted_sum at 0": lambda a, b: sd_mecha.weighted_sum(a, b, alpha=0.0),
    "weighted_sum at 1": lambda a, b: sd_mecha.weighted_sum(a, b, alpha=1.0),
    "slerp": sd_mecha.slerp,
    "slerp at 0": lambda a, b: sd_mecha.slerp(a, b, alpha=0.0),
    "n_average": sd_mecha.n_average,
    "n_average of one": lambda a, b: sd_mecha.n_average(a),
    "add_difference": lambda a, b: sd_mecha.add_difference(a, b - a, alpha=1.0),
    "add nothing": lambda a, b: sd_mecha.add_difference(a, a - a),
    "fallback": lambda a, b: a | b,
    "clamp": lambda a, b: sd_mecha.clamp(a, a, b),
    "add_perpendicular": lambda a, b: sd_mecha.add_perpendicular(a, b, a),
    "cast": lambda a, b: a.to(dtype="float32"),
    "omit_non_finite": lambda a, b: sd_mecha.omit_non_finite(a),
    "shared": lambda a, b: sd_mecha.n_average(sd_mecha.weighted_sum(a, b), a, sd_mecha.weighted_sum(a, b)),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, None])
@pytest.mark.parametrize("threads", [0, 2])
def test_inputs_stay_and_outputs_are_new(name: str, dtype: torch.dtype | None, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = (
        {
            "w": torch.randn(8, 8, generator=generator),
            "half": torch.randn(8, generator=generator).half(),
            "ids": torch.arange(8),
            "scalar": torch.randn((), generator=generator),
        }
        for _ in range(2)
    )
    before = [{k: t.clone() for k, t in model.items()} for model in (one, other)]
    recipe = RECIPES[name](sd_mecha.model(one), sd_mecha.model(other))
    merged = sd_mecha.merge(recipe, merge_dtype=dtype, output_dtype=None, threads=threads)
    outputs = [t for t in merged.values() if isinstance(t, torch.Tensor)]
    assert len(outputs) == 4
    for tensor in outputs:
        tensor.fill_(77)
    for model, kept in zip((one, other), before, strict=True):
        assert model.keys() == kept.keys()
        for key, tensor in model.items():
            assert torch.equal(tensor, kept[key])


def test_streamed_tensors_are_new() -> None:
    model = {"w": torch.ones(4), "v": torch.ones(4)}
    for threads in (0, 2):
        for _, tensor in sd_mecha.stream(sd_mecha.model(model), output_dtype=None, threads=threads):
            tensor.fill_(77)
    assert model["w"].tolist() == [1.0] * 4
    assert model["v"].tolist() == [1.0] * 4


def test_tensors_in_a_recipe_stay() -> None:
    alpha = torch.full((4,), 0.5)
    a, b = (sd_mecha.model({"w": torch.full((4,), value)}) for value in (1.0, 3.0))
    merged = sd_mecha.merge(sd_mecha.weighted_sum(a, b, alpha=alpha), output_dtype=None)
    merged["w"].fill_(77)
    assert alpha.tolist() == [0.5] * 4


def test_an_output_mapping_may_be_an_input() -> None:
    model = {"w": torch.tensor([1.0]), "extra": torch.tensor([5.0])}
    kept = model["w"]
    recipe = sd_mecha.weighted_sum(sd_mecha.model(model), sd_mecha.model({"w": torch.tensor([3.0])}))
    assert sd_mecha.merge(recipe, output=model) is model
    assert model["w"].tolist() == [2.0]
    assert model["extra"].tolist() == [5.0]
    assert kept.tolist() == [1.0]
