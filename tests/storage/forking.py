"""Processes that are forked off by tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest


def forks(test: Callable[..., None]) -> Callable[..., None]:
    """A test that forks; from 3.12 on Python warns, for locks may be held, which is what these tests are about."""
    test = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")(test)


def in_child(work: Callable[[], bool]) -> Callable[[], int]:
    """Start work in a forked process; the result waits for it: 0 if the work returned true."""
    pid = os.fork()
    if not pid:
        signal.alarm(20)  # a child that hangs ends
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
