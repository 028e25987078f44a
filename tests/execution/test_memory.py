"""Memory depends neither on the size of tensors nor on that of models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.memory import least, needs_proc, printed

SCRIPT = """
import sys, threading, time
import torch

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

base = anonymous()
peak = base
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

import sd_mecha
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method

a, b, out, method, threads = sys.argv[1:]
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
recipe = getattr(sd_mecha, method)(sd_mecha.model(a), sd_mecha.model(b))
sd_mecha.merge(recipe, output=out, tqdm=None, threads=int(threads))
done.set()
watcher.join()
print(peak - base)
"""


def write_model(path: Path, numel: int, byte: int) -> None:
    """One fp16 tensor, written without holding it."""
    header = json.dumps({"w": {"dtype": "F16", "shape": [numel], "data_offsets": [0, 2 * numel]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        chunk = bytes([byte, 0x3C]) * (1 << 19)
        for _ in range(2 * numel // len(chunk)):
            file.write(chunk)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("method", ["weighted_sum", "slerp"])
@pytest.mark.parametrize("threads", [0, 2])
def test_two_large_tensors_need_little_memory(method: str, threads: int, tmp_path: Path) -> None:
    numel = 100 << 20  # 200 MB in each file
    a, b, out = (tmp_path / f"{n}.safetensors" for n in ("a", "b", "out"))
    write_model(a, numel, 0)
    write_model(b, numel, 64)
    limit = 64 << 20
    assert least(lambda: printed(SCRIPT, str(a), str(b), str(out), method, str(threads)), limit) <= limit
    assert out.stat().st_size > 2 * numel
