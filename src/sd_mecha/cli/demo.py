"""`sd-mecha demo`: the main job on real data."""

from __future__ import annotations

from pathlib import Path

import click

from sd_mecha.cli.failures import reported


@click.command()
@click.option(
    "--output",
    metavar="DIR",
    default=Path("demo-output"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the models, the recipes and the merges.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def demo(output: Path, debug: bool) -> None:
    """Train two specialists on handwritten digits, merge them, and measure the result.

    One network learns digits 0-4, another 5-9, both from the same base. Merged, they read all ten. Needs
    scikit-learn: pip install 'sd-mecha[demo]'.
    """
    with reported(debug):
        from sd_mecha.demo.report import run

        run(output)
