"""The text of docs/methods.md, from the docstrings of the built-in methods."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import sd_mecha
from docs.panels import PICTURES
from sd_mecha.extensions.catalogue import COST_CLASSES, MethodInfo

PAGE = Path(__file__).parent / "methods.md"
IMAGES = Path(__file__).parent / "images"

ORDER = (
    *("linear", "spherical", "geometric", "fourier", "cosine", "masks"),
    *("ties", "dropout", "stock", "median"),
    *("svd", "kronecker", "extraction", "rotation", "regions", "bounds"),
    *("permutations", "attention_balance"),
    *("select", "block_weights", "exchange", "casting", "adapters"),
)
"""Families as one would read of them; a family that is missing here comes last."""

INTRODUCTION = """\
# Merge methods

<!-- Generated from the docstrings by `make docs`. Edit those. -->

A merge method makes one model of several, nearly always tensor by tensor. A call returns a recipe, and `sd_mecha.merge`
computes it. In Python, `sd_mecha.methods()` lists the methods, those of installed packages included; in a shell,
`sd-mecha methods` does, and `sd-mecha methods slerp` explains one of them.

*Merge space* says what kind of numbers a parameter takes: `weight` is a model as it is, `delta` a difference of two
models, `param` a number or a mask. `any` is the same one wherever it stands in a method.

In the pictures, A and B are two deltas of 32 x 32 entries, each with two smooth hills (one of A is a hollow) and a few
spikes of 1 or -1.
Titles of results are bold. The colours mean the same everywhere: red is positive, blue negative, white 0.

In the examples, a method stands under its own name, and `method.__wrapped__` is its plain function on tensors."""


def page() -> str:
    """The whole page."""
    return "\n\n".join(_blocks()) + "\n"


def families() -> dict[str, list[MethodInfo]]:
    """The built-in methods by family, in reading order."""
    found = {family: infos for family, infos in sd_mecha.methods().families.items() if infos[0].is_builtin}
    rank = {name: position for position, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))


def _blocks() -> Iterator[str]:
    found = families()
    yield INTRODUCTION
    yield "\n".join(_contents(found))
    for family, infos in found.items():
        yield f"## Family {family}"
        yield _first_paragraph(sys.modules[infos[0].module].__doc__)
        if family in PICTURES:
            yield f"![{family}: inputs, and what the methods make of them](images/{family}.png)"
            yield f"*{PICTURES[family].caption}*"
        for info in infos:
            yield from _method(info)
    yield from _ready_made()
    yield from _conversions()


def _contents(found: dict[str, list[MethodInfo]]) -> Iterator[str]:
    yield "| family | methods |"
    yield "|-|-|"
    for family, infos in found.items():
        links = ", ".join(f"[{info.identifier}](#{info.identifier})" for info in infos)
        yield f"| [{family}](#family-{family}) | {links} |"
    yield ""
    yield "Cost classes: " + "; ".join(f"*{cost}*: {meaning}" for cost, meaning in COST_CLASSES.items()) + "."


def _method(info: MethodInfo) -> Iterator[str]:
    text = info.text
    yield f"### {info.identifier}"
    yield text.summary
    yield f"```python\n{_called_as(info)}{info.signature.removeprefix(info.identifier)}\n```"
    yield f"**Formula.** {text.formula}"
    yield "\n".join(
        f"- `{name}` ({space}): {text.arguments.get(name.lstrip('*'), '')}" for name, space in info.merge_spaces.items()
    )
    yield f"**Result.** {info.result_space}"
    yield f"**Use when** {text.use_when}"
    yield f"**Cost ({info.cost}).** {text.cost}"
    yield f"**Source.** {_linked(text.source)}"
    if info.implementations:
        yield "**Implemented by** " + ", ".join(f"`{name}`" for name in info.implementations)
    yield f"```pycon\n{text.example}\n```"


def _called_as(info: MethodInfo) -> str:
    public = getattr(sd_mecha, info.identifier, None)
    return f"sd_mecha.{info.identifier}" if public is info.method else f"resolve({info.identifier!r})"


def _ready_made() -> Iterator[str]:
    """The functions that combine methods."""
    names: dict[FunctionType, list[str]] = {}
    for name in sorted(sd_mecha.__all__):
        value = getattr(sd_mecha, name)
        if isinstance(value, FunctionType) and value.__module__.startswith("sd_mecha.builtin.methods."):
            names.setdefault(value, []).append(name)
    yield "## Ready-made recipes"
    yield (
        "Functions of `sd_mecha` that combine methods, most of them to apply a method for deltas to whole models. "
        "Where one has the name of a method, `sd_mecha.NAME` is the recipe, and "
        '`sd_mecha.extensions.merge_methods.resolve("NAME")` the method.'
    )
    rows = (
        f"| {', '.join(f'`{name}`' for name in shared)} | {_first_paragraph(function.__doc__)} |"
        for function, shared in names.items()
    )
    yield "\n".join(["| recipe | what it does |", "|-|-|", *rows])


def _conversions() -> Iterator[str]:
    """The built-in methods that lead from one model config to another."""
    yield "## Conversions"
    yield (
        "Methods that lead from one model config to another. `sd_mecha.convert` chooses them by itself, and chains "
        "them where none leads all the way."
    )
    rows = (
        f"| `{info.identifier}` | {info.summary} | {info.spaces} | {info.cost} |"
        for info in sd_mecha.methods().chosen_by_config
        if info.is_builtin and info.is_conversion
    )
    yield "\n".join(["| conversion | what it does | merge spaces | cost |", "|-|-|-|-|", *rows])


def _first_paragraph(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
