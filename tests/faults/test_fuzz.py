"""Damaged files of every kind are read or refused: no crash, no hang, no flood of memory. See `fuzz`."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fuzz import FINDINGS, TARGETS, damaged

SECONDS = float(os.environ.get("FUZZ_SECONDS", "120"))
"""For each kind of file, in the slow test."""


def needs(name: str) -> None:
    if name == "gguf" and importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf")


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    needs(name)
    target, rng = TARGETS[name], random.Random(2)
    seeds = target.seeds()
    for data in seeds:
        target(data, tmp_path)
    for _ in range(150):
        target(damaged(rng.choice(seeds), seeds, rng), tmp_path)


@pytest.mark.parametrize("path", sorted(FINDINGS.glob("*/*")), ids=lambda path: path.name)
def test_what_was_found_once(tmp_path: Path, path: Path) -> None:
    needs(path.parent.name)
    TARGETS[path.parent.name](path.read_bytes(), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and limits of memory")
def test_damaged_files_for_minutes() -> None:
    """Two kinds at a time, each for `SECONDS`; the seed is another one each time and shown when something is found."""
    left = [name for name in TARGETS if name != "gguf" or importlib.util.find_spec("gguf") is not None]
    problems = []
    while left:
        pair, left = left[:2], left[2:]
        seed = random.SystemRandom().randrange(10**9)
        commands = [[sys.executable, "-m", "tests.faults.fuzz", name, str(SECONDS), str(seed)] for name in pair]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            for c in commands
        ]
        for name, child in zip(pair, running, strict=True):
            out, err = child.communicate(timeout=SECONDS + 120)
            if child.returncode or "no finding" not in out:
                problems.append(f"{name}, seed {seed}: {err[-3000:]}")
    assert not problems, "\n\n".join(problems)
