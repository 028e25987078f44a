"""The flags that `merge` and `plan` share, and what they mean for `sd_mecha.merge`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sd_mecha.errors import MechaError, RecipeError
from sd_mecha.recipes.tokens import SUFFIX as RECIPE
from sd_mecha.units import parse_size

if TYPE_CHECKING:
    from sd_mecha.recipes.nodes import RecipeNode

Command = TypeVar("Command", bound=Callable[..., Any])

KEEP = "keep"
"""What `--dtype` and `--merge-dtype` take for "as it is in the file"."""


def parsed_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """The bytes that a size on the command line means."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def local_output(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """An output that is a path; an address would become a folder called `https:`."""
    scheme, mark, _rest = (value or "").partition("://")
    if mark and scheme.isalnum():
        raise click.BadParameter(f"{scheme}:// is an address, and outputs are local: write a file, and copy it there")
    return value


recipe_type = click.Path(exists=True, dir_okay=False, path_type=Path)

_dtype_option = click.option(
    "--dtype",
    metavar="DTYPE",
    default="fp16",
    show_default=True,
    help="Of the output: fp16, bf16, fp32 ... or keep.",
)

_dtype_of_file = click.option(
    "--dtype",
    metavar="DTYPE",
    help="That FILE was merged with: fp16, bf16, fp32 ... or keep. Default: found in the file.",
)

_shared = (
    click.option(
        "--models-dir",
        "models_dirs",
        metavar="DIR",
        multiple=True,
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Where relative model paths are looked up, before the working directory. May be repeated.",
    ),
    _dtype_option,
    click.option(
        "--scaled-fp8",
        is_flag=True,
        help="Write the matrices of numbered blocks as fp8 with a scale each.",
    ),
    click.option(
        "--merge-dtype",
        metavar="DTYPE",
        default="fp32",
        show_default=True,
        help="In which the arithmetic is done, or keep.",
    ),
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        help="Where the arithmetic is done: cpu, cuda, cuda:1 ...",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=0),
        help="Number of workers; 0 uses the calling thread. Default: chosen.",
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        callback=parsed_size,
        help="Budget for live tensors, such as 512MB. Default: 256MiB.",
    ),
    click.option(
        "--fallback",
        metavar="FILE",
        help="Model or .mecha recipe to take keys from that the recipe does not produce.",
    ),
    click.option(
        "--merge-space",
        default="weight",
        show_default=True,
        help="In which the result must be: weight, delta, param ... or any.",
    ),
    click.option(
        "--strict-adapters",
        is_flag=True,
        help="Refuse adapters of which a part changes nothing, instead of warning of it.",
    ),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def engine_options(command: Command) -> Command:
    """Give a command the shared flags."""
    for option in reversed(_shared):
        command = option(command)
    return command


def remerge_options(command: Command) -> Command:
    """Give a command the shared flags, for merging again what is in a file."""
    for option in reversed(_shared):
        command = (_dtype_of_file if option is _dtype_option else option)(command)
    return command


def add_models_dirs(models_dirs: tuple[Path, ...]) -> None:
    """Have relative model paths looked up in these directories."""
    from sd_mecha.extensions import model_dirs

    for directory in models_dirs:
        model_dirs.add_path(directory.resolve())


def read_recipe(path: Path) -> RecipeNode:
    """The recipe in a .mecha file.

    Raises:
        RecipeError: it cannot be read; the message names the file.
    """
    import sd_mecha

    try:
        return sd_mecha.deserialize_path(path)
    except MechaError as error:
        if str(path) in str(error):
            raise
        raise RecipeError(f"{path}: {error}") from error


def engine_arguments(
    *,
    dtype: str | None,
    merge_dtype: str,
    device: str,
    threads: int | None,
    memory: int | None,
    fallback: str | None,
    merge_space: str,
    scaled_fp8: bool,
    strict_adapters: bool,
) -> dict[str, Any]:
    """The arguments for `sd_mecha.merge` and `sd_mecha.plan` that the flags stand for."""
    import sd_mecha

    arguments: dict[str, Any] = {
        "output_dtype": ... if dtype is None else _dtype(dtype, "--dtype"),
        "merge_dtype": _dtype(merge_dtype, "--merge-dtype"),
        "merge_device": device,
        "strict_merge_space": None if merge_space == "any" else merge_space,
    }
    if scaled_fp8:
        arguments["scaled_fp8"] = True
    if strict_adapters:
        arguments["strict_adapters"] = True
    if threads is not None:
        arguments["threads"] = threads
    if memory is not None:
        arguments["total_buffer_size"] = memory
    if fallback is not None:
        is_recipe = fallback.endswith(RECIPE)
        arguments["fallback_model"] = read_recipe(Path(fallback)) if is_recipe else sd_mecha.model(fallback)
    return arguments


def _dtype(name: str, flag: str) -> Any:
    from sd_mecha.storage.dtypes import parse_dtype

    if name == KEEP:
        return None
    try:
        return parse_dtype(name)
    except (ValueError, TypeError, KeyError) as error:
        message = error.args[0] if error.args else error
        raise click.BadParameter(str(message), param_hint=f"'{flag}'") from None
