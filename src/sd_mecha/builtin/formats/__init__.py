"""Built-in model formats; importing this package registers them."""

from __future__ import annotations

import importlib

for _name in (
    "peft",
    "diffusers",
    "huggingface",
    "gguf",
    "distributed",
    "pytorch",
    "safetensors",
):
    importlib.import_module(f"{__name__}.{_name}")
