"""What the tests of folder outputs look at, and which files they replace."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def nothing(path: str) -> bool:
    return False


def weights(path: str) -> bool:
    return path.endswith(".safetensors")


def modes(folder: Path) -> dict[str, int]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_symlink()}
    return {name: path.stat().st_mode & 0o777 for name, path in {".": folder, **found}.items()}


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder, and nobody's right to do what its modes forbid: root is somebody else meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)
