"""What the tests of folder outputs look at, and which files they replace."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def nothing(path: str) -> bool:
    return False


def weights(path: str) -> bool:
    return path.endswith(".safetensors")
