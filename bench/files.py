"""The checkpoints that are merged: right names, right shapes, random fp16 weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.shapes import Shape, sd15, sdxl

BLOCK = 1 << 26
"""Bytes of random weights, repeated through a file: making them costs more time than writing them."""

QUICK_BYTES = 1 << 26


@dataclass(frozen=True)
class FileSet:
    """Models of one kind, made when a case needs them."""

    name: str
    count: int
    shapes: Callable[[], Mapping[str, Shape]]

    def make(self, folder: Path, count: int, quick: bool) -> list[Path]:
        """The first `count` files of the set; those that exist already are kept."""
        shapes = self.shapes()
        if quick:
            shapes = cut(shapes, QUICK_BYTES)
        where = folder / (f"{self.name}-quick" if quick else self.name)
        where.mkdir(parents=True, exist_ok=True)
        paths = [where / f"{number:03}.safetensors" for number in range(count)]
        for seed, path in enumerate(paths):
            if not path.exists():
                write_model(path, shapes, seed)
        return paths


def fifty_megabytes() -> dict[str, Shape]:
    return {f"blocks.{i}.weight": (1024, 1024) for i in range(25)}


def four_gigabytes() -> dict[str, Shape]:
    return {"weight": (1 << 15, 1 << 16)}


def two_kilobytes() -> dict[str, Shape]:
    return {f"layers.{i}.weight": (16, 16) for i in range(4)}


SETS = {
    files.name: files
    for files in (
        FileSet("tiny", 2, two_kilobytes),
        FileSet("sd15", 5, sd15),
        FileSet("many", 200, fifty_megabytes),
        FileSet("huge", 2, four_gigabytes),
        FileSet("sdxl", 3, sdxl),
    )
}


def cut(shapes: Mapping[str, Shape], limit: int) -> dict[str, Shape]:
    """Tensors that stay within that many bytes together, none of them large; or else rows of the first."""
    kept: dict[str, Shape] = {}
    left = limit
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if size <= min(limit // 8, left):
            kept[name] = shape
            left -= size
    if kept:
        return kept
    name, shape = next(iter(shapes.items()))
    rows = limit * shape[0] // (2 * math.prod(shape))
    return {name: (max(rows, 1), *shape[1:])}


def write_model(path: Path, shapes: Mapping[str, Shape], seed: int) -> None:
    """Write a safetensors file of fp16 weights around zero, as trained ones are."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(min(BLOCK, end) // 2, generator=generator).mul_(0.02).half()
    block = weights.numpy().tobytes()
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    unfinished.replace(path)
