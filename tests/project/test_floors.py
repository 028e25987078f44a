"""A module imports only from floors below its own; imports inside functions and for type checkers count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "sd_mecha"

FLOORS = (
    {"errors", "units"},
    {"storage"},
    {"recipes"},
    {"extensions", "builtin"},  # plugs use sockets; nobody uses plugs
    {"planning"},
    {"execution"},
    {"logs", "options", "process", "progress"},
    {"graph", "checksums", "resuming"},
    {"conversion", "serialization", "outputs"},
    {"merging"},
    {"adapters", "remerging"},
    {"demo", "verifying"},
    {"cli"},
)
ROOF = {"testing", "recipe_nodes", "streaming", "keys_map"}
"""Conformance suites, and modules that keep names of earlier releases: nothing below may use them."""

LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names} | dict.fromkeys(ROOF, len(FLOORS))


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def floor_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that the module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def may_import(importer: str, target: str) -> bool:
    if importer == target or importer == "__init__":
        return True
    if target == "":  # the façade stands above everything that it offers
        return LEVEL[importer] >= LEVEL["demo"]
    if target == "builtin":
        return LEVEL[importer] > LEVEL["merging"]
    return LEVEL[target] < LEVEL[importer] or (importer, target) == ("builtin", "extensions")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    importer = floor_of(path)
    assert importer in LEVEL or importer in ("__init__", "__main__"), f"give {importer} a floor"
    wrong = []
    for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        if name.split(".")[0] != "sd_mecha":
            continue
        target = name.split(".")[1] if "." in name else ""
        target = target if target in LEVEL else ""
        if not may_import(importer, target):
            wrong.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_imports_inside_functions() -> None:
    text = "def f():\n    import sd_mecha.errors\n    from sd_mecha.merging import merge\n"
    assert list(imported(ast.parse(text))) == [(2, "sd_mecha.errors"), (3, "sd_mecha.merging.merge")]


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("storage", "recipes"),
        ("planning", "builtin"),
        ("builtin", "planning"),
        ("extensions", "builtin"),
        ("planning", "execution"),
        ("execution", "merging"),
        ("merging", "cli"),
        ("merging", ""),
        ("cli", "testing"),
    ],
)
def test_imports_that_point_up_or_sideways_are_refused(importer: str, target: str) -> None:
    assert not may_import(importer, target)
