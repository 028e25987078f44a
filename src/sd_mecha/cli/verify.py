"""`sd-mecha verify`: is a file whole, and is it what it says it is?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sd_mecha.cli.failures import FAILED, message_of, reported
from sd_mecha.cli.options import add_models_dirs, engine_arguments, read_recipe, remerge_options
from sd_mecha.errors import MechaError, OptionError

ALL = "all"


def _sample(_: click.Context, __: click.Parameter, value: str) -> int | None:
    if value == ALL:
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a number nor {ALL!r}")
    return int(value)


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--against",
    metavar="RECIPE.mecha",
    help="Merge some tensors of this recipe again and compare bits; 'embedded' is the recipe in FILE itself.",
)
@click.option(
    "--sample",
    metavar="N",
    default="16",
    show_default=True,
    callback=_sample,
    help=f"How many tensors to merge again, or {ALL}.",
)
@click.option("--seed", type=int, help="What decides which tensors. Default: drawn, and told.")
@click.option("--allow-non-finite", is_flag=True, help="Tell of values that are inf or nan, but accept them.")
@click.option("--skip-inputs", is_flag=True, help="Do not read the models whose checksums FILE has.")
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON.")
@remerge_options
def verify(
    files: tuple[str, ...],
    against: str | None,
    sample: int | None,
    seed: int | None,
    allow_non_finite: bool,
    skip_inputs: bool,
    as_json: bool,
    models_dirs: tuple[Path, ...],
    debug: bool,
    **flags: Any,
) -> None:
    """Check model files: structure, finite values, checksums, and with --against whether a recipe makes them.

    Reads every tensor once. Checksums are there in files that were merged with --checksums. To compare with a
    recipe, give the options that the file was merged with; the dtype is found in the file.

    The exit code is 1 if anything is wrong with any FILE. One that cannot be opened does not keep the others from being
    checked.
    """
    with reported(debug):
        add_models_dirs(models_dirs)
        arguments = engine_arguments(**flags)

        import sd_mecha
        from sd_mecha.verifying import EMBEDDED, Report

        recipe: Any = against if against in (None, EMBEDDED) else read_recipe(Path(str(against)))
        reports = []
        for file in files:
            try:
                report = sd_mecha.verify(
                    file,
                    against=recipe,
                    sample=sample,
                    seed=seed,
                    allow_non_finite=allow_non_finite,
                    inputs=not skip_inputs,
                    **arguments,
                )
            except OptionError:  # it is the same for all files
                raise
            except (MechaError, OSError) as error:
                report = Report(file, problems=[" ".join(message_of(error).split("\n  "))])
            reports.append(report)
            if not as_json:
                click.echo(str(report))
        if as_json:
            click.echo(json.dumps([{**asdict(report), "ok": report.ok} for report in reports], indent=2))
        if not all(report.ok for report in reports):
            raise click.exceptions.Exit(FAILED)
