"""The kinds of files that are damaged: valid ones to begin with, and how each kind is read."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import sd_mecha
from sd_mecha.errors import MechaError
from tests.faults.fuzz import KINDS


class Target:
    """A kind of file."""

    def __init__(self, kind: str, seeds: Callable[[], list[bytes]], attempt: Callable[[Path], None]) -> None:
        self.kind = kind
        self.seeds = seeds
        self.attempt = attempt

    def __call__(self, data: bytes, folder: Path) -> None:
        """Read a file of these bytes.

        Raises:
            Exception: one that is none of the family: a finding.
        """
        path = folder / KINDS[self.kind]
        path.write_bytes(data)
        try:
            self.attempt(path)
        except MechaError as error:
            if not str(error):
                raise AssertionError("an error without a message") from error


def tensors() -> dict[str, torch.Tensor]:
    return {
        "blocks.0.weight": torch.arange(64, dtype=torch.float32).reshape(2, 32),
        "blocks.0.bias": torch.ones(2, dtype=torch.float16),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    }


def try_model(path: Path) -> None:
    """Read everything that a file claims to hold."""
    sd_mecha.merge(
        sd_mecha.model(path),
        output_dtype=None,
        threads=0,
        tqdm=None,
        check_finite_output=False,
        omit_non_finite_inputs=False,
    )


def safetensors_seeds() -> list[bytes]:
    return [
        save(tensors(), {"format": "pt"}),
        save({}),
        save({"w": torch.ones(3).to(torch.float8_e4m3fn)}),
        save(_scaled()),
        save(_four_bits()),
        save({"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4)}),
    ]


def _scaled() -> dict[str, torch.Tensor]:
    values = torch.ones(4, 4).to(torch.float8_e4m3fn)
    return {
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        "a.weight": values,
        "a.scale_weight": torch.tensor(2.0),
        "b.weight": values.clone(),
        "b.weight_scale_inv": torch.ones(2, 2),
    }


def _four_bits() -> dict[str, torch.Tensor]:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64]}
    nested = {**state, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    found = {}
    for name, described, scales in (("a", state, torch.ones(2)), ("b", nested, torch.ones(2, dtype=torch.uint8))):
        found |= {
            f"{name}.weight": torch.arange(64, dtype=torch.uint8).reshape(64, 1),
            f"{name}.weight.absmax": scales,
            f"{name}.weight.quant_map": torch.linspace(-1, 1, 16),
            f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(described).encode())).byte(),
        }
    return {
        **found,
        "b.weight.nested_absmax": torch.ones(1),
        "b.weight.nested_quant_map": torch.linspace(-1, 1, 256),
    }


def index_seeds() -> list[bytes]:
    keys = list(tensors())
    weights = {key: f"model-0000{1 + (n > 1)}-of-00002.safetensors" for n, key in enumerate(keys)}
    return [json.dumps({"metadata": {"total_size": 100}, "weight_map": weights}).encode()]


def try_index(path: Path) -> None:
    parts = list(tensors().items())
    for n, part in enumerate((parts[:2], parts[2:]), start=1):
        shard = path.parent / f"model-0000{n}-of-00002.safetensors"
        if not shard.exists():
            shard.write_bytes(save(dict(part)))
    try_model(path)


def mecha_seeds() -> list[bytes]:
    a, b = sd_mecha.model("a.safetensors"), sd_mecha.model("b.safetensors", "sd1-ldm")
    recipe = sd_mecha.add_difference(a, b, a, alpha={"blocks.0": 0.5, "x": 1}) + sd_mecha.literal({"k": -1.5e-3})
    both = sd_mecha.slerp(a, sd_mecha.ties_sum(a, b, k=0.5), alpha=sd_mecha.literal({"x": 0.5}, "sd1-ldm", "param"))
    more = sd_mecha.fallback(sd_mecha.cast(both, dtype="float16") | recipe, sd_mecha.dropout(a, b, seed=-1))
    recipes = [sd_mecha.serialize(one, finalize=False).encode() for one in (recipe, more)]
    return [*recipes, b'version 0.1.0\nliteral "x\\u00e9"\n']


def try_mecha(path: Path) -> None:
    sd_mecha.serialize(sd_mecha.deserialize_path(path), finalize=False)


def torch_seeds() -> list[bytes]:
    rows = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    contents: list[Any] = [
        tensors(),
        {"state_dict": tensors(), "epoch": 3, "optimizer_states": [{"lr": 0.1}]},
        OrderedDict(a=torch.nn.Parameter(rows), b=rows.T, c=rows[1:, ::2], d=rows[:1].expand(3, 6)),
        {"c": torch.ones(3, dtype=torch.complex64).conj(), "d": torch.ones(2, dtype=torch.float8_e4m3fn)},
    ]
    return [_saved(content, new) for content in contents for new in (True, False)]


def _saved(content: Any, new: bool) -> bytes:
    whole = io.BytesIO()
    torch.save(content, whole, _use_new_zipfile_serialization=new)
    return whole.getvalue()


def gguf_seeds() -> list[bytes]:
    import tempfile

    import gguf
    import numpy as np

    found = []
    kinds = gguf.GGMLQuantizationType
    with tempfile.TemporaryDirectory() as folder:
        for kind in (None, kinds.Q8_0, kinds.Q4_0, kinds.BF16):
            path = Path(folder) / "x.gguf"
            writer = gguf.GGUFWriter(path, "llama")
            writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
            writer.add_uint32("llama.block_count", 2)
            data = np.arange(128, dtype=np.float32).reshape(2, 64)
            if kind is None:
                writer.add_array("comfy.gguf.orig_shape.blk.0.weight", [2, 8, 8])
                writer.add_tensor("blk.0.weight", data)
            else:
                writer.add_tensor("blk.0.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)
            writer.add_tensor("norm", np.ones(3, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            found.append(path.read_bytes())
    return found


TARGETS = {
    target.kind: target
    for target in (
        Target("safetensors", safetensors_seeds, try_model),
        Target("index", index_seeds, try_index),
        Target("mecha", mecha_seeds, try_mecha),
        Target("torch", torch_seeds, try_model),
        Target("gguf", gguf_seeds, try_model),
    )
}
