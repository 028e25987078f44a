"""The results as tables, and where those go in the documentation."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from bench.cases import CASES, IMPORT, INFERENCE, RECIPES, Case
from bench.sources import MEMORY, SOURCES, Source

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NONE = "-"
STEPS = ("build", "repr", "serialize", "deserialize", "plan")


def render(results: Mapping[str, Any]) -> str:
    """All tables, for the cases that have results."""
    parts = [machine()]
    merges = [merge_row(case, results[case.name]) for case in CASES if case.name in results]
    if merges:
        parts.append(
            _table(
                "case|floor|2.0 (process)|1.1.8 (process)|against 1.1.8|against floor|memory|memory of 1.1.8",
                merges,
            )
        )
        parts.append("In brackets what is wanted; ✗ marks what is missed.")
    if IMPORT in results:
        torch, ours, shown = (median(results[IMPORT][name]) for name in ("torch", "sd_mecha", "help"))
        parts.append(
            f"`import sd_mecha` and what a merge needs adds {ours - torch:.2f} s to the {torch:.2f} s of "
            f"`import torch`{_verdict(ours - torch <= 0.25, '<= 0.25 s')}. `sd-mecha --help` takes {_seconds(shown)}"
            f"{_verdict(shown <= 0.3, '<= 300 ms')}."
        )
    if INFERENCE in results:
        first, later = (median(results[INFERENCE][name]) for name in ("first", "later"))
        parts.append(
            f"Finding the config of a header of {median(results[INFERENCE]['keys']):.0f} keys takes {_seconds(later)}"
            f"{_verdict(later <= 0.03, '<= 30 ms')}, the first time in a process {_seconds(first)}, "
            "which includes building the configs that it may be."
        )
    sources = [source_row(source, results[name]) for name, source in SOURCES.items() if name in results]
    if sources:
        parts.append(_table("weighted_sum of 2 SD1.5, warm|time|plain files|against plain files|memory", sources))
    recipes = [recipe_row(title, results[kind]) for kind, title in RECIPES.items() if kind in results]
    if recipes:
        parts.append(_table("recipe|build|print|serialize|deserialize|plan|memory", recipes))
    return "\n\n".join(parts) + "\n"


def merge_row(case: Case, row: Mapping[str, Any]) -> list[str]:
    floor, new = median(row["floor"]), median(row["new"]["seconds"])
    memory = median(row["new"]["memory"])
    old = row.get("old")
    cells = [case.title, _seconds(floor), _times(row["new"])]
    if case.seconds is not None:
        cells[-1] += _verdict(new <= case.seconds, f"<= {_seconds(case.seconds)}")
    if old is None:
        cells += [NONE, NONE]
    else:
        faster = median(old["seconds"]) / new
        met = _verdict(faster >= case.faster, f">= {case.faster:g}x") if case.faster else ""
        cells += [_times(old), f"{faster:.1f}x faster{met}"]
    slower = new / floor
    cells.append(f"{slower:.2f}x" + (_verdict(slower <= case.floor, f"<= {case.floor:g}x") if case.floor else ""))
    met = _verdict(memory <= case.memory, f"<= {_memory(case.memory)}") if case.memory else ""
    cells.append(_memory(memory) + met)
    cells.append(NONE if old is None else _memory(median(old["memory"])))
    return cells


def source_row(source: Source, row: Mapping[str, Any]) -> list[str]:
    seconds, plain, memory = (median(row[name]) for name in ("seconds", "plain", "memory"))
    slower = seconds / plain
    wanted = _verdict(slower <= source.slower, f"<= {source.slower:g}x") if source.slower else ""
    met = _verdict(memory <= MEMORY, f"<= {_memory(MEMORY)}")
    return [source.title, _seconds(seconds), _seconds(plain), f"{slower:.2f}x{wanted}", _memory(memory) + met]


def recipe_row(title: str, row: Mapping[str, Any]) -> list[str]:
    times = [_seconds(row["seconds"][step]) if step in row["seconds"] else NONE for step in STEPS]
    return [title, *times, _memory(row["memory"])]


def machine() -> str:
    """What the figures were measured on."""
    parts = [f"{os.cpu_count()} cores ({platform.machine()})"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        parts.append(f"{size / 2**30:.0f} GiB of memory")
    parts.append(platform.system())
    parts.append(f"Python {platform.python_version()}")
    parts.append(f"torch {metadata.version('torch')}")
    return "Measured on " + ", ".join(parts) + "."


def write_into(document: Path, text: str) -> None:
    """Replace what stands between the markers of a document."""
    before, found, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{document} lacks the markers {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8", newline="\n")


def _table(header: str, rows: list[list[str]]) -> str:
    columns = header.split("|")
    lines = [columns, ["-"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(side: Mapping[str, Any]) -> str:
    return f"{_seconds(median(side['seconds']))} ({_seconds(median(side['wall']))})"


def _seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def _memory(value: float) -> str:
    return f"{value / 1e6:.0f} MB" if value < 999.5e6 else f"{value / 1e9:.1f} GB"


def _verdict(met: bool, wanted: str) -> str:
    return f" ({wanted})" if met else f" ({wanted}) ✗"
