"""The recipes of the demo: four ways to make one network of two that learned different things."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sd_mecha

if TYPE_CHECKING:
    from sd_mecha.recipes.nodes import RecipeNode


def recipes(base: Path, low: Path, high: Path) -> dict[str, RecipeNode]:
    """Recipes that merge two specialists, by name.

    Args:
        base: the model that both were trained from.
        low: the specialist in digits 0-4.
        high: the specialist in digits 5-9.
    """
    start, a, b = (sd_mecha.model(path) for path in (base, low, high))
    return {
        "weighted sum": sd_mecha.weighted_sum(a, b, alpha=0.5),
        "slerp": sd_mecha.slerp(a, b, alpha=0.5),
        "average of three": sd_mecha.n_average(start, a, b),
        "task arithmetic": start + (a - start) * 0.6 + (b - start) * 0.6,
    }


def write_recipe(recipe: RecipeNode, path: Path) -> None:
    """Save a recipe as .mecha text, to be merged again by anyone who has the models."""
    path.write_text(sd_mecha.serialize(recipe, finalize=False), encoding="utf-8", newline="\n")
