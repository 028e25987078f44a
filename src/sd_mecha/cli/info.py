"""`sd-mecha info`: what a model file, or a model config, is made of."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sd_mecha.cli.failures import reported
from sd_mecha.cli.options import add_models_dirs
from sd_mecha.errors import UnknownNameError

if TYPE_CHECKING:
    from rich.table import Table

    from sd_mecha.extensions.model_configs import ModelConfig
    from sd_mecha.storage.contract import TensorEntry

WIDE = 120
"""Columns where the output is no terminal."""

_LONGEST = 60


@dataclass(frozen=True)
class Subject:
    """What is described: a config, and the tensors of a file by the config's keys, or the shapes that it declares."""

    config: ModelConfig
    sizes: Mapping[str, int | None]  # key -> number of parameters, None where the config leaves the shape open
    lines: tuple[str, ...]


@click.command()
@click.argument("model_or_config", metavar="FILE|CONFIG")
@click.option("--blocks", is_flag=True, help="List the blocks, by the names that sd_mecha.weights knows them by.")
@click.option(
    "--models-dir",
    "models_dirs",
    metavar="DIR",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where a relative path is looked up, before the working directory. May be repeated.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def info(model_or_config: str, blocks: bool, models_dirs: tuple[Path, ...], debug: bool) -> None:
    """Tell what the model FILE is, or what keys the model config CONFIG has.

    Reads the header of a file, no tensors.
    """
    with reported(debug):
        add_models_dirs(models_dirs)

        from rich.console import Console

        from sd_mecha.extensions.blocks import blocks_of

        with described(model_or_config) as subject:
            width = None if sys.stdout.isatty() else WIDE
            console = Console(file=sys.stdout, width=width, highlight=False, markup=False)
            for line in subject.lines:
                console.print(line, soft_wrap=True)
            components = {name: c.keys() for name, c in subject.config.components().items()}
            console.print(table("component", components, subject.sizes))
            if blocks:
                found = blocks_of(subject.config)
                console.print(table("block", found, subject.sizes) if found else "The keys show no blocks.")


@contextmanager
def described(model_or_config: str) -> Iterator[Subject]:
    """The file of that path, where there is one or the name looks like that of a file; otherwise the config."""
    import sd_mecha
    from sd_mecha.extensions import model_configs
    from sd_mecha.planning.configs import solve_configs
    from sd_mecha.planning.opening import open_models

    if not _is_file(model_or_config):
        try:
            config = model_configs.resolve(model_or_config)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error}; nor is there a file of that name") from None
        if model_configs.is_stub(config):
            raise click.UsageError(f"{model_or_config!r} stands for a config that depends on a file: give a file")
        sizes = {key: None if m.shape is None else prod(m.shape) for key, m in config.keys().items()}
        optional = sum(metadata.optional for metadata in config.keys().values())
        yield Subject(
            config, sizes, (f"config: {config.identifier}", f"keys: {len(sizes)}, {optional} of them optional")
        )
        return
    node = sd_mecha.model(model_or_config)
    with open_models(node) as models:
        reader = models[node]
        config = solve_configs(node, models)[node]
        stored = {config.resolve_alias(name): entry for name, entry in reader.entries.items()}
        yield Subject(
            config,
            {key: entry.numel for key, entry in stored.items()},
            (
                f"file: {reader.name}",
                f"config: {config.identifier}" + (" (no known one fits)" if config.identifier == "structural" else ""),
                f"tensors: {dtype_counts(reader.entries.values())}",
                *_unknown(config, stored),
                *(f"metadata: {key} = {_short(value)}" for key, value in reader.metadata.items()),
            ),
        )


def table(what: str, groups: Mapping[str, Iterable[str]], sizes: Mapping[str, int | None]) -> Table:
    """A row for each group of keys that has any: its name, how many there are, and how many parameters they hold."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    shown.add_column(what, no_wrap=True)
    shown.add_column("keys", justify="right")
    shown.add_column("parameters", justify="right")
    for name, keys in groups.items():
        present = [sizes[key] for key in keys if key in sizes]
        if present:
            known = [size for size in present if size is not None]
            total = f"{sum(known):,}" if len(known) == len(present) else f"{sum(known):,} or more"
            shown.add_row(name, f"{len(present):,}", total)
    return shown


def dtype_counts(entries: Iterable[TensorEntry]) -> str:
    """How many tensors there are of each dtype, the most frequent first."""
    from sd_mecha.storage.dtypes import dtype_name

    counts = Counter(dtype_name(entry.dtype) for entry in entries)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"


def _unknown(config: ModelConfig, names: Iterable[str]) -> list[str]:
    extra = [name for name in names if name not in config.keys()]  # noqa: SIM118 (it is no mapping)
    return [f"not in the config: {len(extra)} keys, such as {extra[0]!r}"] if extra else []


def _is_file(text: str) -> bool:
    from sd_mecha.extensions import model_configs, model_dirs

    paths = [Path(text), *(Path(folder) / text for folder in model_dirs.get_all())]
    named = [config.identifier for config in model_configs.get_all()]
    return any(path.is_file() for path in paths) or (
        text not in (*named, "infer", "structural")
        and (
            Path(text).suffix == ".safetensors"
            or len(Path(text).parts) > 1
            or any(path.is_dir() or path.is_symlink() for path in paths)
        )
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}... ({len(text)} characters)"
