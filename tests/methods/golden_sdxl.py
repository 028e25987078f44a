"""The cases of sd-mecha 1 on one attention layer of Stable Diffusion XL."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch

import sd_mecha

FILE = Path(__file__).parents[1] / "golden" / "methods" / "sdxl_permutation_cases.json.gz"
GOLDEN: dict[str, Any] = json.loads(gzip.decompress(FILE.read_bytes()))

Tensors = dict[str, torch.Tensor]


def cases(method: str) -> list[dict[str, Any]]:
    return [case for case in GOLDEN["cases"] if case["method"] == method]


def golden_input() -> Tensors:
    generator = torch.Generator().manual_seed(77)
    return {key: torch.randn(shape, generator=generator) for key, shape in GOLDEN["keys"].items()}


def merged(recipe: Any) -> Tensors:
    result = sd_mecha.merge(recipe, merge_dtype=None, output_dtype=None, threads=0)
    result.pop("__metadata__", None)
    return result
