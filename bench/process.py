"""Run a child process and watch its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL = 0.005


@dataclass(frozen=True)
class Run:
    """What a child process cost, and the JSON that it printed last."""

    wall: float
    anonymous: int
    """Peak of its anonymous memory in bytes: what it holds, without files that the system caches for it."""
    answer: Any


class ChildError(RuntimeError):
    """A child process failed or took too long."""


def run(command: Sequence[str | os.PathLike[str]], *, timeout: float = 3600, log: Path) -> Run:
    """Run a command to its end.

    Args:
        command: the command; the last line that it prints is read as JSON, if there is one.
        timeout: seconds after which it is killed.
        log: receives its standard error; what it prints goes beside it.

    Raises:
        ChildError: it failed or took too long.
    """
    answer = log.with_suffix(".answer")  # a file, which unlike a pipe never makes the child wait
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with log.open("wb") as errors, answer.open("wb") as out:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=errors, stdin=subprocess.DEVNULL, env=compiled)
        peak = 0
        while child.poll() is None:
            peak = max(peak, anonymous_memory(child.pid))
            if time.perf_counter() - started > timeout:
                child.kill()
                child.wait()
                raise ChildError(f"{command[0]} took more than {timeout:.0f} s")
            time.sleep(INTERVAL)
        wall = time.perf_counter() - started
    if child.returncode:
        tail = log.read_text(errors="replace").strip().splitlines()[-5:]
        raise ChildError(f"{command[0]} ended with code {child.returncode}:\n" + "\n".join(tail))
    printed = answer.read_text(encoding="utf-8").strip()
    return Run(wall, peak, json.loads(printed.splitlines()[-1]) if printed else None)


def anonymous_memory(pid: int) -> int:
    """Anonymous memory of a process right now, 0 if it has ended."""
    status = Path(f"/proc/{pid}/status")
    try:
        _, found, rest = status.read_bytes().partition(b"RssAnon:")
        return int(rest.split(None, 1)[0]) * 1024 if found else 0
    except OSError:
        return 0 if sys.platform == "linux" else _unshared_memory(pid)


def _unshared_memory(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0
