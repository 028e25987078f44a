"""The memory that a process knows of."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sd_mecha import process


def test_peak_memory_grows_with_what_is_held() -> None:
    code = (
        "from sd_mecha.process import peak_memory; before = peak_memory();"
        "held = b'x' * 50_000_000; after = peak_memory(); print(after - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 45_000_000


def test_peak_memory_without_procfs_comes_from_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource")
    monkeypatch.setattr(process, "_from_proc", lambda: None)
    peak = process.peak_memory()
    assert peak is not None
    assert peak > 1_000_000


def test_a_system_that_tells_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("_from_proc", "_from_getrusage", "_from_windows"):
        monkeypatch.setattr(process, source, lambda: None)
    assert process.peak_memory() is None
