"""A merge that is stopped from outside: a clean end where that is possible, and the old file in every case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.support import OLD, many, only_file, read

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends signals to a child")

SLOW = """
import sys, time, torch, sd_mecha
from sd_mecha import Parameter, Return, merge_method

@merge_method(register=False)
def slow(a: Parameter(torch.Tensor), b: Parameter(torch.Tensor)) -> Return(torch.Tensor):
    if not a.is_meta:
        print("tensor", flush=True)
        time.sleep(0.05)
    return (a + b) / 2

recipe = slow(sd_mecha.model(sys.argv[1]), sd_mecha.model(sys.argv[2]))
try:
    sd_mecha.merge(recipe, output=sys.argv[3], threads=int(sys.argv[4]))
except KeyboardInterrupt:
    sys.exit(42)
"""
"""Exits with 42 if the merge ended with exactly a KeyboardInterrupt."""


def start(tmp_path: Path, old: Path, threads: int) -> subprocess.Popen[str]:
    one, other = many(tmp_path / "one.safetensors", 0.0), many(tmp_path / "other.safetensors", 2.0)
    command = [sys.executable, "-c", SLOW, one, other, old, str(threads)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop(child: subprocess.Popen[str], with_signal: int) -> str:
    """Send the signal when some tensors are done; what the child said on its error stream."""
    assert child.stdout is not None
    for _ in range(5):
        child.stdout.readline()
    assert child.poll() is None
    child.send_signal(with_signal)
    return child.communicate(timeout=60)[1]


@pytest.mark.parametrize("threads", [0, 2])
def test_ctrl_c_ends_soon_and_leaves_nothing(tmp_path: Path, old: Path, threads: int) -> None:
    with start(tmp_path, old, threads) as child:
        began = time.monotonic()
        errors = stop(child, signal.SIGINT)
    assert child.returncode == 42, errors
    assert time.monotonic() - began < 30
    assert errors == ""
    assert old.read_bytes() == OLD
    assert only_file(old)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("kind", [signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)])
def test_a_killed_merge_leaves_the_old_file_whole(tmp_path: Path, old: Path, threads: int, kind: int) -> None:
    with start(tmp_path, old, threads) as child:
        stop(child, kind)
    assert child.returncode == -kind
    assert old.read_bytes() == OLD
    visible = [path.name for path in old.parent.iterdir() if not path.name.startswith(".")]
    assert visible == [old.name]
    assert read(tmp_path / "one.safetensors").keys() == read(tmp_path / "other.safetensors").keys()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1])
def test_ctrl_c_at_any_moment(tmp_path: Path, old: Path, delay: float) -> None:
    code = """
import sys, sd_mecha
recipe = sd_mecha.weighted_sum(sd_mecha.model(sys.argv[1]), sd_mecha.model(sys.argv[2]))
sd_mecha.merge(recipe)
print("ready", flush=True)
try:
    for _ in range(1000):
        sd_mecha.merge(recipe, output=sys.argv[3], threads=3, total_buffer_size=1 << 18)
except KeyboardInterrupt:
    sys.exit(42)
"""
    one, other = many(tmp_path / "one.safetensors", 0.0), many(tmp_path / "other.safetensors", 2.0)
    command = [sys.executable, "-c", code, one, other, old, "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.2 + delay)
        child.send_signal(signal.SIGINT)
        errors = child.communicate(timeout=60)[1]
    assert child.returncode == 42, errors
    assert only_file(old)
    assert old.read_bytes() == OLD or len(read(old)) == 40
