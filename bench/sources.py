"""What it costs that models lie in other files or elsewhere, and that a merge can be resumed.

Each merge is compared with the same one of plain files, in the same run. The inputs are in the page cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.files import SETS
from bench.floor import warm
from bench.process import run

CHILDREN = Path(__file__).parent / "children"
FILES = "sd15"
MEMORY = 128_000_000
SHARDS = 10


@dataclass(frozen=True)
class Source:
    """A way to store the two models, or to merge them.

    Attributes:
        title: for the table.
        slower: wanted, at most so many times the seconds of plain files, if anything.
        options: further ones of the merge.
    """

    title: str
    slower: float | None
    options: tuple[tuple[str, Any], ...] = ()


SOURCES = {
    "folders": Source(f"two folders of {SHARDS} shards", 1.1),
    "torch_files": Source("two PyTorch files", 1.2),
    "http": Source("two files from a web server on this machine", 2.0),
    "resume": Source("plain files, resume=True", 1.03, (("resume", True),)),
    "checksums": Source("plain files, checksums=True", None, (("checksums", True),)),
}


def measure(name: str, work: Path, repeats: int, quick: bool) -> dict[str, Any]:
    """Seconds of merging plain files, and seconds and memory of the same from a source."""
    source = SOURCES[name]
    files = SETS[FILES].make(work, 2, quick)
    bare = run([sys.executable, "-c", "import torch, time; time.sleep(0.05)"], log=work / "child.log").anonymous
    row: dict[str, Any] = {"plain": [], "seconds": [], "memory": []}
    with stored(name, files, work) as (inputs, read):
        for turn in range(repeats):
            warm(files)
            plain = _merge(files, work, {})
            warm(read)
            done = _merge(inputs, work, dict(source.options))
            row["plain"].append(plain.answer["seconds"][0])
            row["seconds"].append(done.answer["seconds"][0])
            row["memory"].append(done.anonymous - bare)
            shown = f"{row['seconds'][-1]:.3f} s, plain {row['plain'][-1]:.3f} s, {row['memory'][-1] / 1e6:.0f} MB"
            print(f"  {turn + 1}/{repeats}: {shown}", flush=True)
    return row


@contextmanager
def stored(name: str, files: list[Path], work: Path) -> Iterator[tuple[list[Any], list[Path]]]:
    """The models in another way: what to name in the recipe, and the files behind it."""
    if name == "http":
        with _served(files[0].parent) as address:
            yield [f"{address}/{path.name}" for path in files], files
        return
    make: Callable[[Path, Path], list[Path]] | None = {"folders": _shards, "torch_files": _torch}.get(name)
    if make is None:
        yield list(files), files
        return
    places = [work / name / path.stem for path in files]
    try:
        parts = [part for place, path in zip(places, files, strict=True) for part in make(place, path)]
        yield list(places), parts
    finally:
        shutil.rmtree(work / name, ignore_errors=True)


def _shards(folder: Path, path: Path) -> list[Path]:
    folder.mkdir(parents=True)
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        size = -(-len(keys) // SHARDS)
        weights: dict[str, str] = {}
        for number in range(SHARDS):
            name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
            part = keys[number * size : (number + 1) * size]
            save_file({key: file.get_tensor(key) for key in part}, folder / name)
            weights |= dict.fromkeys(part, name)
    index = json.dumps({"metadata": {}, "weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return sorted(folder.glob("*.safetensors"))


def _torch(place: Path, path: Path) -> list[Path]:
    place.parent.mkdir(parents=True, exist_ok=True)
    with safe_open(path, "pt") as file:
        torch.save({"state_dict": {key: file.get_tensor(key) for key in file.keys()}}, place)  # noqa: SIM118
    return [place]


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    command = [sys.executable, str(CHILDREN / "range_server.py"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.kill()
            time.sleep(0.1)


def _merge(inputs: list[Any], work: Path, options: dict[str, Any]) -> Any:
    output = work / "output.safetensors"
    job = {
        "method": "weighted_sum",
        "inputs": [str(path) for path in inputs],
        "output": str(output),
        "times": 1,
        "options": options,
    }
    try:
        return run([sys.executable, CHILDREN / "merge_once.py", json.dumps(job)], log=work / "child.log")
    finally:
        output.unlink(missing_ok=True)
