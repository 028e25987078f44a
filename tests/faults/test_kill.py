"""Merges killed at random moments: the old file or the whole new one, and what a later run makes of the rest."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sd_mecha
from tests.faults.killable import Killable
from tests.faults.support import OLD, only_file, write_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes")

KEYS = 24


@pytest.fixture
def killable() -> Iterator[Killable]:
    killable = Killable()
    yield killable
    killable.close()


def model(path: Path, seed: int, nan: bool) -> Path:
    """A model of several dtypes; with tensors that nobody can use, which an output lacks."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(KEYS):
        dtype = (torch.float32, torch.float16)[i % 2]
        tensors[f"k{i:02}"] = torch.randn(900 + i, generator=generator).to(dtype)
        if nan and i in (3, 10, 17):
            tensors[f"k{i:02}"][-1] = torch.nan
    return write_model(path, **tensors)


class Stage:
    """An output, the models it is made from, and what must be true of it at any time."""

    def __init__(self, folder: Path, nan: bool) -> None:
        self.models = [model(folder / f"{seed}.safetensors", seed, nan) for seed in (1, 2)]
        whole = folder / "whole.safetensors"
        recipe = sd_mecha.n_average(*map(sd_mecha.model, self.models))
        sd_mecha.merge(recipe, output=whole, threads=0, tqdm=None, output_dtype=None)
        self.expected = whole.read_bytes()
        self.output = folder / "out" / "out.safetensors"
        self.output.parent.mkdir()
        self.reset()

    def reset(self) -> None:
        self.output.write_bytes(OLD)

    def check(self) -> None:
        assert self.output.read_bytes() in (OLD, self.expected)
        hidden = {f".{self.output.name}.part", f".{self.output.name}.part.journal"}
        assert {p.name for p in self.output.parent.iterdir()} <= {self.output.name} | hidden

    def done(self) -> None:
        assert self.output.read_bytes() == self.expected
        assert only_file(self.output)

    def journalled(self) -> int:
        """Tensors that the journal of a killed run calls complete."""
        path = self.output.parent / f".{self.output.name}.part.journal"
        try:
            names = [json.loads(line)[0] for line in path.read_bytes().split(b"\n")[1:-1]]
        except FileNotFoundError:
            return 0
        return len(set(names))


def kill_again_and_again(killable: Killable, folder: Path, kills: int, seed: int) -> None:
    stages = []
    for nan in (False, True):
        (folder / str(nan)).mkdir()
        stages.append(Stage(folder / str(nan), nan))
    rng = random.Random(seed)
    durations = {}
    for threads in (2, 0, 2):  # the first starts the server, too
        began = time.monotonic()
        assert killable.merge(*stages[0].models, stages[0].output, threads, False) == 0
        durations[threads] = time.monotonic() - began
        stages[0].done()
        stages[0].reset()
    killed = continued = 0
    while killed < kills:
        stage, threads = rng.choice(stages), rng.choice([0, 2])
        resume = rng.random() < 0.8
        moment = rng.uniform(0, 1.05 * durations[threads])
        status = killable.merge(*stage.models, stage.output, threads, resume, moment)
        stage.check()
        if status == 0:
            stage.done()
            stage.reset()
            continue
        assert status == -signal.SIGKILL
        killed += 1
        if rng.random() < 0.5:
            resume = rng.random() < 0.7
            continued += resume and stage.journalled() > 0
            assert killable.merge(*stage.models, stage.output, rng.choice([0, 2]), resume) == 0
            stage.done()
            stage.reset()
    for stage in stages:
        assert killable.merge(*stage.models, stage.output, 0, True) == 0
        stage.done()
    assert continued >= kills // 50


def test_killed_at_ten_moments(killable: Killable, tmp_path: Path) -> None:
    kill_again_and_again(killable, tmp_path, 10, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_two_hundred_moments(killable: Killable, tmp_path: Path, seed: int) -> None:
    """Fifty each; the seeds differ in order, moments and numbers of threads."""
    kill_again_and_again(killable, tmp_path, 50, seed=seed + 1)
