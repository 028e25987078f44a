"""`sd-mecha methods`: which merge methods there are, and what one of them does."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sd_mecha.cli.failures import reported

if TYPE_CHECKING:
    from rich.table import Table

    from sd_mecha.extensions.catalogue import MethodInfo, Methods

WIDE = 150
"""Columns that a line with all facts of a method needs."""


@click.command()
@click.argument("name", required=False)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def methods(name: str | None, debug: bool) -> None:
    """List the merge methods, or explain the one called NAME.

    The list has what installed packages add, too.
    """
    with reported(debug):
        import sd_mecha

        known = sd_mecha.methods()
        if name is not None:
            click.echo(explained(known[name]))
            return

        from rich.console import Console

        width = None if sys.stdout.isatty() else WIDE  # for `grep`, and the same in every pipe
        console = Console(file=sys.stdout, width=width, highlight=False)
        console.print(table(known, wide=console.width >= WIDE))
        for line in (*chosen_by_config(known), *legend(known)):
            console.print(line, soft_wrap=True, markup=False)


def explained(info: MethodInfo) -> str:
    """Everything that is known of one method, as text."""
    from sd_mecha.extensions.catalogue import COST_CLASSES

    spaces = ", ".join(f"{parameter} {space}" for parameter, space in info.merge_spaces.items())
    implementations = [f"Implemented by: {', '.join(info.implementations)}"] if info.implementations else []
    lines = [
        info.signature,
        "",
        info.text.whole or "(no docstring)",
        "",
        f"Merge spaces: {spaces} -> {info.result_space}",
        f"Cost class: {info.cost} ({COST_CLASSES[info.cost]})",
        *implementations,
        f"Defined in: {info.module}",
    ]
    return "\n".join(lines)


def table(known: Methods, wide: bool) -> Table:
    """One row per method, a section per family; without what is chosen by model config.

    Args:
        known: the methods.
        wide: give merge spaces and cost columns of their own, instead of a line below the sentence.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    shown.add_column("method", no_wrap=True)
    shown.add_column("what it does" if wide else "what it does; merge spaces, cost")
    for heading in ("merge spaces", "cost") if wide else ():
        shown.add_column(heading, no_wrap=True)
    for family, infos in known.families.items():
        shown.add_row(Text(family, style="bold"))
        for info in infos:
            summary, facts = Text(info.summary), (Text(info.spaces), Text(info.cost))
            if not wide:
                summary.append(f"\n{info.spaces}; {info.cost}", style="dim")
            shown.add_row(Text(f"  {info.identifier}"), summary, *(facts if wide else ()))
        shown.add_section()
    return shown


def chosen_by_config(known: Methods) -> list[str]:
    """Conversions and implementations, one line each: their names are too long for a table."""
    lines = [f"  {info.identifier}  {info.spaces}  {info.cost}" for info in known.chosen_by_config]
    return ["Chosen by model config, in sd_mecha.convert or for a method above:", *lines, ""] if lines else []


def legend(known: Methods) -> list[str]:
    """What the words in the table mean, of those that occur."""
    from sd_mecha.extensions.catalogue import COST_CLASSES

    used = {info.cost for info in known.values()}
    lines = [f"  {cost:12} {meaning}" for cost, meaning in COST_CLASSES.items() if cost in used]
    spaces = "Merge spaces: of models and deltas, then of the result; `any` is one and the same within a line."
    return ["Cost:", *lines, spaces, "One method in full: sd-mecha methods NAME"]
