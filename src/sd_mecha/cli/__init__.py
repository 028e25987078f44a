"""The command line, one file per command.

Nothing here imports torch before a command runs, so that help and usage errors come at once.
"""

from __future__ import annotations

import click

from sd_mecha.cli.adapters import adapter_error, combine, extract, resize
from sd_mecha.cli.demo import demo
from sd_mecha.cli.info import info
from sd_mecha.cli.merge import merge
from sd_mecha.cli.methods import methods
from sd_mecha.cli.plan import plan
from sd_mecha.cli.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sd-mecha", message="%(prog)s %(version)s")
def main() -> None:
    """Merge neural network checkpoints by recipe, in constant memory."""


main.add_command(merge)
main.add_command(plan)
main.add_command(info)
main.add_command(verify)
main.add_command(methods)
main.add_command(extract)
main.add_command(resize)
main.add_command(combine)
main.add_command(adapter_error)
main.add_command(demo)

__all__ = ["main"]
