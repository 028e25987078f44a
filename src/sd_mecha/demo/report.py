"""Train, merge, measure, and show the result as a table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sd_mecha
from sd_mecha.demo.digits import HELD_OUT, Digits, State, accuracy, load, network, trained
from sd_mecha.demo.recipes import recipes, write_recipe
from sd_mecha.errors import MechaError
from sd_mecha.process import peak_memory
from sd_mecha.units import format_seconds, format_size

BASE_STEPS = 40
SPECIALIST_STEPS = 200
SPECIALISTS = ("digits 0-4", "digits 5-9")


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table: a model and how well it reads digits that it never saw."""

    name: str
    file: Path
    everything: float
    low: float
    high: float
    seconds: float | None = None
    beats_both: bool = False


def run(output: Path, console: Console | None = None) -> list[Result]:
    """Run the demo and print what came of it.

    Args:
        output: folder for models, recipes and merges.
        console: where to print.

    Returns:
        One result per model: the base, the two specialists, then the merges.

    Raises:
        MechaError: scikit-learn is missing, or a merge by text differs from the same merge in Python.
    """
    console = console or Console()
    started = time.monotonic()
    train, test = load()
    with _one_torch_thread():
        models = train_models(train, output.resolve())
        results = [measure(name, path, test) for name, path in models.items()]
        results += merge_models(models, output.resolve(), test, goal=max(r.everything for r in results[1:]))
    console.print(table(results))
    peak = peak_memory()
    memory = "" if peak is None else f", peak memory {format_size(peak)}"
    console.print(f"[bold]{format_seconds(time.monotonic() - started)}[/] with training{memory}")
    console.print("Each merge was made twice, from its .mecha text and in Python: the same bits.")
    console.print(f"Models, recipes and merges are in {output}", soft_wrap=True)
    console.print(f"Next: sd-mecha plan '{output / 'task_arithmetic.mecha'}'", soft_wrap=True)
    return results


def train_models(train: Digits, folder: Path) -> dict[str, Path]:
    """Train the base, and from it two specialists; save all three."""
    folder.mkdir(parents=True, exist_ok=True)
    base = trained(network().state_dict(), train, BASE_STEPS)
    states = {
        "base": base,
        SPECIALISTS[0]: trained(base, train.only(0, 4), SPECIALIST_STEPS),
        SPECIALISTS[1]: trained(base, train.only(5, 9), SPECIALIST_STEPS),
    }
    paths = {name: folder / f"{_file_name(name)}.safetensors" for name in states}
    for name, state in states.items():
        sd_mecha.merge(sd_mecha.model(state), output=paths[name], output_dtype=torch.float32)
    return paths


def merge_models(models: dict[str, Path], folder: Path, test: Digits, goal: float) -> list[Result]:
    """Merge by every recipe, from text and in Python, and measure."""
    results = []
    for name, recipe in recipes(*models.values()).items():
        text, merged = (folder / f"{_file_name(name)}.{suffix}" for suffix in ("mecha", "safetensors"))
        write_recipe(recipe, text)
        started = time.monotonic()
        sd_mecha.merge(sd_mecha.deserialize_path(text), output=merged)
        seconds = time.monotonic() - started
        if not same_bits(read(merged), _tensors(sd_mecha.merge(recipe))):
            raise MechaError(f"{text} and the same recipe in Python gave different results")
        results.append(measure(name, merged, test, seconds, goal))
    return results


def measure(name: str, path: Path, test: Digits, seconds: float | None = None, goal: float | None = None) -> Result:
    """Test a saved model on the held-out digits."""
    state = read(path)
    everything, low, high = (accuracy(state, d) for d in (test, test.only(0, 4), test.only(5, 9)))
    return Result(name, path, everything, low, high, seconds, goal is not None and everything > goal)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, as they are in there."""
    return _tensors(sd_mecha.merge(sd_mecha.model(path), merge_dtype=None, output_dtype=None))


def same_bits(a: State, b: State) -> bool:
    """Whether two state dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(_bits(a[k]), _bits(b[k])) for k in a
    )


def table(results: list[Result]) -> Table:
    """The results as a table to print."""
    shown = Table(title=f"Accuracy on {HELD_OUT} held-out digits", title_justify="left")
    shown.add_column("model")
    for heading in ("all", "0-4", "5-9", "merged in"):
        shown.add_column(heading, justify="right")
    shown.add_column("")
    for position, result in enumerate(results):
        shown.add_row(
            result.name,
            *(f"{share:.1%}" for share in (result.everything, result.low, result.high)),
            "" if result.seconds is None else format_seconds(result.seconds),
            "beats both" if result.beats_both else "",
            style="green" if result.beats_both else None,
            end_section=position == len(SPECIALISTS),
        )
    return shown


def _tensors(state: object) -> dict[str, Tensor]:
    assert isinstance(state, dict)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _file_name(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    # The network is too small to share out, and one thread gives the same numbers everywhere.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
