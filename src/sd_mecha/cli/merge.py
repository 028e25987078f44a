"""`sd-mecha merge`: recipes in, files out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
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

SUFFIX = ".safetensors"


@click.command()
@click.argument("recipes", metavar="RECIPE.mecha...", nargs=-1, required=True, type=recipe_type)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="File to write; the folder, if it is one, ends in a slash, or there are several recipes.",
)
@engine_options
@click.option("--no-progress", is_flag=True, help="Show no progress bar.")
def merge(
    recipes: tuple[Path, ...],
    output: str | None,
    models_dirs: tuple[Path, ...],
    no_progress: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Merge each recipe into a file.

    Without -o, NAME.mecha gives NAME.safetensors in the recipe's own folder; with a folder, NAME.safetensors
    in there. OUT is relative to the working directory; --models-dir is for models to be read. Several recipes
    are merged in one pass, which reads a model that they share once.

    An output appears under its name when it is complete; until then, and if anything fails, a file of that
    name stays as it was. It may be one of the inputs.
    """
    with reported(debug):
        outputs = output_paths(recipes, output)
        add_models_dirs(models_dirs)
        arguments = engine_arguments(**flags)
        nodes = [read_recipe(path) for path in recipes]

        import sd_mecha
        from sd_mecha.progress import NoProgress, RichProgress

        arguments["tqdm"] = NoProgress if no_progress else RichProgress
        for folder in {path.parent for path in outputs}:
            folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        if len(nodes) == 1:
            sd_mecha.merge(nodes[0], output=outputs[0], **arguments)
        else:
            sd_mecha.merge_many(dict(zip(outputs, nodes, strict=True)), **arguments)
        click.echo(summary(outputs, time.monotonic() - started))


def output_paths(recipes: Sequence[Path], output: str | None) -> list[Path]:
    """Where each recipe's result goes, as absolute paths.

    Raises:
        click.UsageError: several recipes would be written to one file.
    """
    if output is None:
        paths = [recipe.with_suffix(SUFFIX) for recipe in recipes]
    elif is_folder(output):
        paths = [Path(output) / recipe.with_suffix(SUFFIX).name for recipe in recipes]
    elif len(recipes) == 1:
        paths = [Path(output)]
    elif Path(output).is_file() or Path(output).suffix == SUFFIX:
        raise click.UsageError(f"{len(recipes)} recipes cannot go into one file: give a folder instead of {output}")
    else:
        paths = [Path(output) / recipe.with_suffix(SUFFIX).name for recipe in recipes]
    paths = [path.absolute() for path in paths]  # else a relative one would go to the first models dir
    writers: dict[Path, Path] = {}
    for recipe, path in zip(recipes, paths, strict=True):
        if path in writers:
            raise click.UsageError(f"{writers[path]} and {recipe} would both be written to {path}")
        writers[path] = recipe
    return paths


def is_folder(output: str) -> bool:
    """Whether the text of an output path means a folder."""
    return Path(output).is_dir() or output.endswith(("/", os.sep))


def summary(outputs: Sequence[Path], seconds: float) -> str:
    """The closing line: what was written, in what time, at what rate, with how much memory."""
    from sd_mecha.process import peak_memory
    from sd_mecha.units import format_seconds, format_size

    size = sum(path.stat().st_size for path in outputs)
    what = str(outputs[0]) if len(outputs) == 1 else f"{len(outputs)} files in {outputs[0].parent}"
    rate = size / max(seconds, 1e-9)
    line = f"{what}: {format_size(size)} in {format_seconds(seconds)} ({format_size(rate)}/s)"
    peak = peak_memory()
    return line if peak is None else f"{line}, peak memory {format_size(peak)}"
