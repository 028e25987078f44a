"""`sd-mecha extract`, `resize`, `combine` and `adapter-error`: adapters as a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sd_mecha.cli.failures import reported
from sd_mecha.cli.options import add_models_dirs, local_output

Command = TypeVar("Command", bound=Callable[..., Any])

STYLES = ("kohya", "comfyui", "diffusers", "peft")

_OUTPUT = click.option("-o", "--output", metavar="OUT", required=True, callback=local_output, help="File to write.")
_DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
_MODELS_DIR = click.option(
    "--models-dir",
    "models_dirs",
    metavar="DIR",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where relative paths are looked up, before the working directory. May be repeated.",
)
_DEVICE = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1 ...")
_RANKS = (
    click.option("--rank", type=int, help="Largest rank of each module."),
    click.option("--energy", type=float, metavar="SHARE", help="Share of the squared singular values to keep."),
    click.option("--frobenius", type=float, metavar="SHARE", help="Share of the Frobenius norm to keep."),
    click.option("--conv-rank", type=int, help="Largest rank of kernels of more than one element."),
)


def _ranked(command: Command) -> Command:
    for option in reversed(_RANKS):
        command = option(command)
    return command


@click.command()
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="[BASE]", required=False)
@_OUTPUT
@click.option("--kind", type=click.Choice(("lora", "lokr")), default="lora", show_default=True, help="What to make.")
@_ranked
@click.option("--kronecker-ratio", type=float, default=0.5, show_default=True, help="How a LoKr shares out entries.")
@click.option("--diffs", is_flag=True, help="Store changes of biases and norms as well.")
@click.option(
    "--style", type=click.Choice(STYLES), default="kohya", show_default=True, help="Whose names of modules to write."
)
@click.option("--exact", is_flag=True, help="Decompose in full instead of by random projections; slow.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random projections.")
@click.option("--dtype", default="fp16", show_default=True, help="Of the output: fp16, bf16, fp32 ...")
@_DEVICE
@_MODELS_DIR
@_DEBUG
def extract(
    tuned: str,
    base: str | None,
    output: str,
    exact: bool,
    models_dirs: tuple[Path, ...],
    debug: bool,
    **arguments: Any,
) -> None:
    """Extract an adapter from the difference of the models TUNED and BASE.

    Both may be recipes. Without BASE, TUNED is a recipe that ends in a difference, or a file of one.

    How large it gets is set by a rank, or by the share of each weight's change that it must keep. Prints how much of
    the difference it misses.
    """
    with reported(debug):
        add_models_dirs(models_dirs)

        import sd_mecha

        made = sd_mecha.extract_adapter(tuned, base, randomized=not exact, output=_path(output), **arguments)
        click.echo(_summary(output, made))


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@_OUTPUT
@_ranked
@click.option("--dtype", help="Of the output: fp16, bf16, fp32 ... Default: as it is.")
@_MODELS_DIR
@_DEBUG
def resize(adapter: str, output: str, models_dirs: tuple[Path, ...], debug: bool, **arguments: Any) -> None:
    """Bring ADAPTER to a lower rank, by number or by the share of each module that is kept."""
    with reported(debug):
        add_models_dirs(models_dirs)

        import sd_mecha

        click.echo(_summary(output, sd_mecha.resize_adapter(adapter, output=_path(output), **arguments)))


@click.command()
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@_OUTPUT
@_ranked
@click.option("--style", type=click.Choice(STYLES), help="Whose names of modules to write; needs --base.")
@click.option("--base", metavar="MODEL|CONFIG", help="What the adapters are for; tells which names mean the same.")
@click.option("--dtype", help="Of the output: fp16, bf16, fp32 ... Default: as the first adapter.")
@_MODELS_DIR
@_DEBUG
def combine(
    adapters: tuple[str, ...], output: str, models_dirs: tuple[Path, ...], debug: bool, **arguments: Any
) -> None:
    """Add adapters up to one, each times its WEIGHT, which is 1 where none is given.

    Without a rank the sum is exact, and ranks add up. With one ADAPTER and a --style, its modules are renamed.
    """
    with reported(debug):
        pairs = [_weighted(text) for text in adapters]
        add_models_dirs(models_dirs)

        import sd_mecha

        click.echo(_summary(output, sd_mecha.combine_adapters(pairs, output=_path(output), **arguments)))


@click.command(name="adapter-error")
@click.argument("adapter", metavar="ADAPTER")
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="BASE")
@_DEVICE
@_MODELS_DIR
@_DEBUG
def adapter_error(adapter: str, tuned: str, base: str, device: str, models_dirs: tuple[Path, ...], debug: bool) -> None:
    """Tell how much of the difference of TUNED and BASE the ADAPTER misses, weight by weight.

    The error is the norm of what is missing relative to the norm of the difference; the worst weights come first.
    """
    with reported(debug):
        add_models_dirs(models_dirs)

        import sd_mecha

        click.echo(str(sd_mecha.compare_adapter(adapter, tuned, base, device=device)))


def _weighted(text: str) -> tuple[str, float]:
    """The path and the weight in `path=weight`; a file may have `=` in its name."""
    path, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise click.BadParameter(f"{weight!r} in {text!r} is no number", param_hint="'ADAPTER[=WEIGHT]'") from None


def _path(output: str) -> Path:
    return Path(output).absolute()  # else a relative one would go to the first models dir


def _summary(output: str, made: dict[str, Any]) -> str:
    import json

    facts = json.loads(made["__metadata__"]["mecha_adapter"])
    ranks = [module["rank"] for module in facts["modules"].values() if "rank" in module]
    parts = [f"{output}: {len(facts['modules'])} modules"]
    if ranks:
        parts.append(f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}")
    if "error" in facts:
        parts.append(f"relative error {facts['error']:.4g}")
    return ", ".join(parts)
