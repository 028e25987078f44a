"""Memory of a process is measured with what the C library, threads and the system hold at that moment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TRIES = 5

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


def least(measure: Callable[[], float], enough: float) -> float:
    """The least of a few measurements, for what disturbs one only adds to it; the first that is `enough` ends it."""
    found = measure()
    for _ in range(TRIES - 1):
        if found <= enough:
            break
        found = min(found, measure())
    return found


def printed(program: str, *arguments: str) -> float:
    """The number that a program prints."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return float(done.stdout)
