"""`sd-mecha merge`: recipes in, files out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from sd_mecha.cli.failures import reported
from sd_mecha.cli.options import (
    add_models_dirs,
    engine_arguments,
    engine_options,
    local_output,
    parsed_size,
    read_recipe,
    recipe_type,
)
from sd_mecha.recipes.tokens import SUFFIX as RECIPE
from sd_mecha.storage.links import broken_link

SUFFIX = ".safetensors"


@click.command()
@click.argument("recipes", metavar="RECIPE.mecha...", nargs=-1, required=True, type=recipe_type)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    callback=local_output,
    help="File to write; the folder, if it is one, ends in a slash, or there are several recipes.",
)
@engine_options
@click.option("--format", "output_format", metavar="NAME", help="Of the output: safetensors, huggingface, gguf ...")
@click.option(
    "--shard-size",
    metavar="SIZE",
    callback=parsed_size,
    help="Write a folder with files of at most this much, such as 5GB.",
)
@click.option(
    "--side-files",
    metavar="MODEL",
    help="Model whose configuration, tokenizer and the like go along. Default: the first that has some.",
)
@click.option("--resume", is_flag=True, help="Go on where an interrupted merge of this kind stopped.")
@click.option("--checksums", is_flag=True, help="Keep a checksum of every tensor read and written.")
@click.option("--no-progress", is_flag=True, help="Show no progress bar.")
def merge(
    recipes: tuple[Path, ...],
    output: str | None,
    models_dirs: tuple[Path, ...],
    no_progress: bool,
    debug: bool,
    output_format: str | None,
    shard_size: int | None,
    side_files: str | None,
    resume: bool,
    checksums: bool,
    **flags: Any,
) -> None:
    """Merge each recipe into a file.

    Without -o, NAME.mecha gives NAME.safetensors in the recipe's own folder; with a folder, NAME.safetensors
    in there. OUT is relative to the working directory; --models-dir is for models to be read. Several recipes
    are merged in one pass, which reads a model that they share once.

    With --shard-size, or --format huggingface or diffusers, the output is a folder, OUT itself for a single
    recipe.

    An output appears under its name when it is complete; until then, and if anything fails, a file of that
    name stays as it was. It may be one of the inputs.
    """
    with reported(debug):
        suffix = suffix_of(output_format, shard_size)
        outputs = output_paths(recipes, output, suffix)
        add_models_dirs(models_dirs)
        arguments = engine_arguments(**flags)
        nodes = [read_recipe(path) for path in recipes]
        check_places(recipes, outputs)

        import sd_mecha
        from sd_mecha.logs import set_log_level
        from sd_mecha.progress import NoProgress, RichProgress

        arguments["tqdm"] = NoProgress if no_progress else RichProgress
        if resume:
            set_log_level("INFO")  # how much is complete already
        asked = {
            "output_format": output_format,
            "shard_size": shard_size,
            "side_files": side_files,
            "resume": resume or None,
            "checksums": checksums or None,
        }
        arguments |= {name: value for name, value in asked.items() if value is not None}
        started = time.monotonic()
        with folders_of(outputs):
            if len(nodes) == 1:
                sd_mecha.merge(nodes[0], output=outputs[0], **arguments)
            else:
                sd_mecha.merge_many(dict(zip(outputs, nodes, strict=True)), **arguments)
        click.echo(summary(outputs, time.monotonic() - started))


def suffix_of(output_format: str | None, shard_size: int | None) -> str:
    """The ending of outputs that are named after their recipes; none for folders.

    Raises:
        UnknownNameError: there is no such format.
    """
    if output_format is None:
        return SUFFIX if shard_size is None else ""
    from sd_mecha.extensions import model_formats

    return next(iter(model_formats.resolve(output_format).suffixes), "")


def output_paths(recipes: Sequence[Path], output: str | None, suffix: str = SUFFIX) -> list[Path]:
    """Where each recipe's result goes, as absolute paths.

    Args:
        recipes: the recipes.
        output: the output that the user named.
        suffix: ending of a result that is named after its recipe; "" if it is a folder.

    Raises:
        click.UsageError: several recipes would be written to one file, or a file is named as if it were a folder, or
            a model as if it were a recipe.
    """
    if output is not None and not is_folder(output) and output.lower().endswith(RECIPE):
        raise click.UsageError(
            f"{output} has the name of a recipe: name the model {Path(output).with_suffix(suffix or SUFFIX)}"
        )
    if output is None:
        paths = [recipe.with_suffix(suffix) for recipe in recipes]
    elif len(recipes) == 1 and not (suffix and is_folder(output)):
        paths = [Path(output)]
    elif output.endswith(("/", os.sep)) and (Path(output).is_file() or (suffix and Path(output).suffix == suffix)):
        what = "is a file" if Path(output).is_file() else f"has the ending {suffix} of a file"
        raise click.UsageError(
            f"{output} means a folder, by the slash at its end, and {Path(output)} {what}: leave the slash out, or "
            "give a folder"
        )
    elif Path(output).is_file() or (suffix and Path(output).suffix == suffix):
        raise click.UsageError(f"{len(recipes)} recipes cannot go into one file: give a folder instead of {output}")
    else:
        paths = [Path(output) / recipe.with_suffix(suffix).name for recipe in recipes]
    paths = [path.absolute() for path in paths]  # else a relative one would go to the first models dir
    writers: dict[Path, Path] = {}
    for recipe, path in zip(recipes, paths, strict=True):
        if path in writers:
            raise click.UsageError(f"{writers[path]} and {recipe} would both be written to {path}")
        writers[path] = recipe
    return paths


def check_places(recipes: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Refuse outputs that would take the place of a recipe, or lie in what is no folder.

    Raises:
        click.UsageError: naming the output.
    """
    for path in outputs:
        for recipe in recipes:
            if path.exists() and path.samefile(recipe):
                raise click.UsageError(f"{path} is the recipe {recipe} itself: name the model another way")
        blocking = next((folder for folder in path.parents if os.path.lexists(folder)), None)
        if blocking is not None and not blocking.is_dir():
            what = broken_link(blocking) or f"{str(blocking)!r} is a file"
            raise click.UsageError(f"{path} cannot be written: {what}, and no folder")


@contextlib.contextmanager
def folders_of(outputs: Sequence[Path]) -> Iterator[None]:
    """Make the folders that outputs go into; after a failure, those that were made and are empty go again."""
    missing = {folder for path in outputs for folder in path.parents if not folder.exists()}
    try:
        for path in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in sorted(missing, reverse=True):  # what lies in another comes before it
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def is_folder(output: str) -> bool:
    """Whether the text of an output path means a folder."""
    return Path(output).is_dir() or output.endswith(("/", os.sep))


def summary(outputs: Sequence[Path], seconds: float) -> str:
    """The closing line: what was written, in what time, at what rate, with how much memory."""
    from sd_mecha.process import peak_memory
    from sd_mecha.units import format_seconds, format_size

    files = [file for path in outputs for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    what = str(outputs[0]) if len(outputs) == 1 else f"{len(outputs)} results in {outputs[0].parent}"
    rate = size / max(seconds, 1e-9)
    line = f"{what}: {format_size(size)} in {format_seconds(seconds)} ({format_size(rate)}/s)"
    peak = peak_memory()
    return line if peak is None else f"{line}, peak memory {format_size(peak)}"
