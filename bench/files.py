"""The checkpoints that are merged: right names, right shapes, random fp16 weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sd_mecha.extensions import model_configs

Shape = tuple[int, ...]

BLOCK = 1 << 26
"""Bytes of random weights, repeated through a file: making them costs more time than writing them."""

QUICK_BYTES = 1 << 26

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class FileSet:
    """Models of one kind, made when a case needs them."""

    name: str
    count: int
    shapes: Callable[[], Mapping[str, Shape]]
    dtype: str = "F16"

    def largest(self) -> int:
        """Bytes of its largest tensor in fp32."""
        return 4 * max(math.prod(shape) for shape in self.shapes().values())

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
                write_model(path, shapes, seed, self.dtype)
        return paths


def sd15() -> dict[str, Shape]:
    """Stable Diffusion 1.5, 2.1 GB in fp16."""
    return checkpoint("sd1-ldm")


def sdxl() -> dict[str, Shape]:
    """Stable Diffusion XL base, 6.9 GB in fp16."""
    return checkpoint("sdxl-sgm")


def checkpoint(config: str) -> dict[str, Shape]:
    """What files hold of a config; they have the text encoders' last layers, which are optional there."""
    return {
        key: metadata.shape or ()
        for key, metadata in model_configs.resolve(config).keys().items()
        if not metadata.optional or (key.startswith("conditioner.") and not key.endswith("position_ids"))
    }


def lora(rank: int) -> dict[str, Shape]:
    """A LoRA of kohya-ss for the transformer blocks of SDXL and the attention of its text encoders."""
    shapes: dict[str, Shape] = {}
    for key, metadata in model_configs.resolve("sdxl-kohya").keys().items():
        shape, module = metadata.shape or (), key.removesuffix(".weight")
        if len(shape) == 2 and module != key and (".transformer_blocks." in key or ".self_attn." in key):
            name = "lora_" + module.replace(".", "_")
            shapes[f"{name}.lora_down.weight"] = (rank, shape[1])
            shapes[f"{name}.lora_up.weight"] = (shape[0], rank)
            shapes[f"{name}.alpha"] = ()
    return shapes


def fifty_megabytes() -> dict[str, Shape]:
    return {f"blocks.{i}.weight": (1024, 1024) for i in range(25)}


def four_gigabytes() -> dict[str, Shape]:
    return {"weight": (1 << 15, 1 << 16)}


def token_embedding() -> dict[str, Shape]:
    """That of a large language model, 2.1 GB in bf16."""
    return {"embed_tokens.weight": (128256, 8192)}


def attention() -> dict[str, Shape]:
    """Attention of the first blocks of SD1.5, 42 MB in fp16."""
    blocks = tuple(f"model.diffusion_model.input_blocks.{i}.1." for i in (1, 2, 4, 5, 7))
    return {name: shape for name, shape in sd15().items() if name.startswith(blocks) and ".attn" in name}


def matrices() -> dict[str, Shape]:
    """One transformer block of each width of SD1.5 and a convolution, 64 MB in fp16."""
    blocks = tuple(f"model.diffusion_model.input_blocks.{i}.1.transformer_blocks.0." for i in (1, 4, 7))
    convolution = "model.diffusion_model.input_blocks.4.0.out_layers.3."
    return {name: shape for name, shape in sd15().items() if name.startswith((*blocks, convolution))}


def two_kilobytes() -> dict[str, Shape]:
    return {f"layers.{i}.weight": (16, 16) for i in range(4)}


SETS = {
    files.name: files
    for files in (
        FileSet("tiny", 2, two_kilobytes),
        FileSet("sd15", 5, sd15),
        FileSet("many", 200, fifty_megabytes),
        FileSet("attention", 20, attention),
        FileSet("matrices", 2, matrices),
        FileSet("huge", 2, four_gigabytes),
        FileSet("embedding", 5, token_embedding, "BF16"),
        FileSet("lora", 1, partial(lora, 64)),
        FileSet("loras", 20, partial(lora, 8)),
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


def write_model(path: Path, shapes: Mapping[str, Shape], seed: int, dtype: str = "F16") -> None:
    """Write a safetensors file of fp16 or bf16 weights around zero, as trained ones are."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(min(BLOCK, end) // 2, generator=generator).mul_(0.02)
    block = weights.to(TYPES[dtype]).view(torch.int16).numpy().tobytes()
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    unfinished.replace(path)
