"""Damaged files of every kind are read or refused: no crash, no hang, no flood of memory. See `fuzz`."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.fuzz import FINDINGS, KINDS, fuzz
from tests.faults.fuzz_damage import damaged
from tests.faults.fuzz_gguf import gguf_parts, gguf_whole
from tests.faults.fuzz_targets import TARGETS

SECONDS = float(os.environ.get("FUZZ_SECONDS", "120"))
"""For each kind of file, in the slow test."""


def needs(kind: str) -> None:
    if kind == "gguf" and importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    needs(kind)
    target, rng = TARGETS[kind], random.Random(2)
    seeds = target.seeds()
    for data in seeds:
        target(data, tmp_path)
    for _ in range(150):
        target(damaged(kind, rng.choice(seeds), seeds, rng), tmp_path)


def test_parts_of_a_gguf_file_make_the_file() -> None:
    needs("gguf")
    for data in TARGETS["gguf"].seeds():
        keys, tensors, rest = gguf_parts(data)
        assert len(tensors) == 2
        assert gguf_whole(keys, tensors, rest) == data


@pytest.mark.parametrize("path", sorted(FINDINGS.glob("*/*")), ids=lambda path: path.name)
def test_what_was_found_once(tmp_path: Path, path: Path) -> None:
    needs(path.parent.name)
    TARGETS[path.parent.name](path.read_bytes(), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="memory cannot be limited there")
def test_damaged_files_for_minutes() -> None:
    """Two kinds at a time, each for `SECONDS`; the seed is another one each time and shown when something is found."""
    kinds = [kind for kind in KINDS if kind != "gguf" or importlib.util.find_spec("gguf") is not None]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda kind: fuzz(kind, SECONDS, random.SystemRandom().randrange(1, 10**9)), kinds)
        found = [problem for _, problem in results if problem]
    assert not found, "\n\n".join(found)
