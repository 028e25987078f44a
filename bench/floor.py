"""The least that a merge can cost: every byte read once, every byte written once and synced."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def floor(inputs: Sequence[Path], output: Path, size: int) -> float:
    """Seconds that cat and dd take for these inputs and an output of that size.

    dd writes 4 MiB at a time; what is left of the size goes in one last block.
    """
    block = 1 << 22
    blocks, rest = divmod(size, block)
    started = time.perf_counter()
    subprocess.run(["cat", *inputs], stdout=subprocess.DEVNULL, check=True)
    if blocks:
        _dd(output, f"bs={block}", f"count={blocks}")
    if rest:
        _dd(output, f"bs={rest}", "count=1", "oflag=append", "conv=notrunc")
    descriptor = os.open(output, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - started
    output.unlink()
    return seconds


def warm(inputs: Sequence[Path]) -> None:
    """Have the inputs in the page cache, as far as it holds them."""
    subprocess.run(["cat", *inputs], stdout=subprocess.DEVNULL, check=True)


def evict(inputs: Sequence[Path]) -> None:
    """Have the inputs out of the page cache, where the system can be asked for that."""
    os.sync()
    if not hasattr(os, "posix_fadvise"):
        return
    for path in inputs:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _dd(output: Path, *operands: str) -> None:
    subprocess.run(["dd", "if=/dev/zero", f"of={output}", "status=none", *operands], check=True)
