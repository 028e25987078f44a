"""`sd-mecha plan`: what a merge would do, from file headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sd_mecha.cli.failures import reported
from sd_mecha.cli.options import (
    add_models_dirs,
    engine_arguments,
    engine_options,
    read_recipe,
    recipe_type,
)


@click.command()
@click.argument("recipe", metavar="RECIPE.mecha", type=recipe_type)
@engine_options
def plan(recipe: Path, models_dirs: tuple[Path, ...], debug: bool, **flags: Any) -> None:
    """Explain what merging RECIPE.mecha would do: inputs, output, steps, bytes and memory.

    Reads file headers, no tensors, and writes nothing.
    """
    with reported(debug):
        add_models_dirs(models_dirs)
        arguments = engine_arguments(**flags)
        node = read_recipe(recipe)

        import sd_mecha

        click.echo(str(sd_mecha.plan(node, **arguments)))
