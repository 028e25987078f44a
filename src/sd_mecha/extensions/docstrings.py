"""The parts of a merge method's docstring.

    One sentence.

    Formula: what is computed.

    Args:
        a: what it must be.

    Use when: ...
    Cost: ...
    Source: ...

and then an example as a doctest. Every part may be missing: methods of third parties document themselves as they like.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_HEADING = re.compile(r"(Formula|Args|Returns|Raises|Use when|Cost|Source):(?:\s+|$)")
_ARGUMENT = re.compile(r" {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*): ?")


@dataclass(frozen=True, slots=True)
class MethodText:
    """What a docstring says, without its line breaks; a part that is missing is empty."""

    summary: str = ""
    formula: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    use_when: str = ""
    cost: str = ""
    source: str = ""
    example: str = ""
    whole: str = ""
    """The docstring as it stands, without its indentation."""


def read_docstring(text: str | None) -> MethodText:
    """Take a docstring apart.

    >>> text = read_docstring('''Add two models.
    ...
    ...     Formula: `a + b`.
    ...
    ...     Args:
    ...         a, b: weights,
    ...             not deltas.
    ...     ''')
    >>> text.summary, text.formula, text.arguments
    ('Add two models.', '`a + b`.', {'a': 'weights, not deltas.', 'b': 'weights, not deltas.'})
    """
    whole = inspect.cleandoc(text or "")
    prose, marker, example = whole.partition("\n>>> ")
    parts: dict[str, list[str]] = {"summary": []}
    current: list[str] | None = parts["summary"]
    for line in prose.splitlines():
        if heading := _HEADING.match(line):
            current = parts[heading[1]] = [line[heading.end() :]]
        elif not line.strip():
            current = None if current is parts["summary"] else current  # the first paragraph alone
        elif current is not None:
            current.append(line)
    return MethodText(
        summary=_joined(parts["summary"]),
        formula=_joined(parts.get("Formula", ())),
        arguments=_arguments(parts.get("Args", [])),
        use_when=_joined(parts.get("Use when", ())),
        cost=_joined(parts.get("Cost", ())),
        source=_joined(parts.get("Source", ())),
        example=f">>> {example}".rstrip() if marker else "",
        whole=whole,
    )


def _joined(lines: list[str] | tuple[()]) -> str:
    return " ".join(line.strip() for line in lines).strip()


def _arguments(lines: list[str]) -> dict[str, str]:
    """The text of each argument; those that share one are listed one by one."""
    collected: list[tuple[str, list[str]]] = []
    for line in lines:
        if start := _ARGUMENT.match(line):
            collected.append((start[1], [line[start.end() :]]))
        elif collected:
            collected[-1][1].append(line)
    return {name.strip("* "): _joined(text) for names, text in collected for name in names.split(",")}
