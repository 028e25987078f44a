"""A recipe of twelve methods on top of each other needs no more memory for twenty files than for five."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.files import sd15, write_model
from bench.process import run
from tests.memory import least, needs_proc

MERGE_ONCE = Path(__file__).parents[2] / "bench" / "children" / "merge_once.py"


@pytest.mark.slow
@needs_proc
def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    shapes = {  # three tenths as wide
        name: tuple(size * 3 // 10 for size in shape)
        for name, shape in sd15().items()
        if "input_blocks" in name and ".attn" in name
    }
    paths = [tmp_path / f"{number}.safetensors" for number in range(20)]
    for seed, path in enumerate(paths):
        write_model(path, shapes, seed)
    size = paths[0].stat().st_size
    output = tmp_path / "output.safetensors"

    def peak(count: int) -> float:
        job = {"method": "nested", "inputs": [str(path) for path in paths[:count]], "output": str(output), "times": 1}
        done = run([sys.executable, MERGE_ONCE, json.dumps(job)], log=tmp_path / "log")
        assert output.stat().st_size >= size
        return done.anonymous

    limit = peak(5) + 15 * size / 4  # of what the other fifteen files hold, none should stay
    assert least(lambda: peak(20), limit) <= limit
