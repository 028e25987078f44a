"""Throws broken files at the readers, in a process of its own: `python -m tests.faults.fuzz TARGET SECONDS SEED`.

Files are valid ones with random damage. A reader may accept one or raise an error of the family. Any other error, more
than 512 MB of memory, and ten seconds over one file are findings: the file is kept, and the process fails.
"""

from __future__ import annotations

import random
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

import sd_mecha
from sd_mecha.errors import MechaError

MEMORY = 512 << 20
PATIENCE = 10  # seconds for one file
FINDINGS = Path(__file__).parent / "findings"
"""Where the files of earlier findings are kept, by target; they are tried again by the tests."""

_NUMBERS = [
    0,
    1,
    -1,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**60,
    2**63 - 1,
    2**64 - 1,
]
_WORDS = [
    b"0",
    b"-1",
    b"9" * 30,
    b"1e999",
    b"NaN",
    b"null",
    b'"',
    b"{",
    b"[" * 50,
    b"../",
    b"\\ud800",
    b"\n",
    b"\xff",
    b"&1",
]


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A file with one to eight random changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = len(changed)
        # Headers are what readers interpret: most changes go there.
        at = rng.randrange(min(size, rng.choice((16, 64, 512, 4096, 1 << 30))) + 1)
        kind = rng.randrange(9)
        if kind == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < size:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            changed[at : at + rng.choice((4, 8))] = number(rng)
        elif kind == 4:
            changed[at : at + rng.choice((0, 1, 4))] = rng.choice(_WORDS)
        elif kind == 5:
            del changed[at : at + rng.choice((1, 2, 8, 64, 1024))]
        elif kind == 6:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 64, 256))] * rng.choice((1, 2, 20))
        elif kind == 7:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            changed[at : at + rng.randrange(64)] = other[start : start + rng.randrange(64)]
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def number(rng: random.Random) -> bytes:
    value = rng.choice(_NUMBERS)
    return struct.pack("<q", value) if -(2**63) <= value < 2**63 else struct.pack("<Q", value)


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


class Target:
    """A kind of file."""

    def __init__(self, seeds: Callable[[], list[bytes]], attempt: Callable[[Path], None], name: str) -> None:
        self.seeds = seeds
        self.attempt = attempt
        self.name = name

    def __call__(self, data: bytes, folder: Path) -> None:
        """Read a file of these bytes.

        Raises:
            Exception: one that is none of the family: a finding.
        """
        path = folder / self.name
        path.write_bytes(data)
        try:
            self.attempt(path)
        except MechaError as error:
            if not str(error):
                raise AssertionError("an error without a message") from error


def safetensors_seeds() -> list[bytes]:
    return [save(tensors(), {"format": "pt"}), save({}), save({"w": torch.ones(3).to(torch.float8_e4m3fn)})]


def index_seeds() -> list[bytes]:
    keys = list(tensors())
    weights = ", ".join(f'"{key}": "model-0000{1 + (n > 1)}-of-00002.safetensors"' for n, key in enumerate(keys))
    return [f'{{"metadata": {{"total_size": 100}}, "weight_map": {{{weights}}}}}'.encode()]


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
    return [sd_mecha.serialize(recipe, finalize=False).encode(), b'version 0.1.0\nliteral "x\\u00e9"\n']


def try_mecha(path: Path) -> None:
    sd_mecha.serialize(sd_mecha.deserialize_path(path), finalize=False)


def torch_seeds() -> list[bytes]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        for content in (tensors(), {"state_dict": tensors(), "epoch": 3, "optimizer_states": [{"lr": 0.1}]}):
            for new in (True, False):
                torch.save(content, path, _use_new_zipfile_serialization=new)
                found.append(path.read_bytes())
    return found


def gguf_seeds() -> list[bytes]:
    import gguf
    import numpy as np

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in (None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
            path = Path(folder) / "x.gguf"
            writer = gguf.GGUFWriter(path, "llama")
            writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
            writer.add_uint32("llama.block_count", 2)
            data = np.arange(128, dtype=np.float32).reshape(2, 64)
            if kind is None:
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
    "safetensors": Target(safetensors_seeds, try_model, "x.safetensors"),
    "index": Target(index_seeds, try_index, "model.safetensors.index.json"),
    "mecha": Target(mecha_seeds, try_mecha, "x.mecha"),
    "torch": Target(torch_seeds, try_model, "x.ckpt"),
    "gguf": Target(gguf_seeds, try_model, "x.gguf"),
}


def main(name: str, seconds: float, seed: int) -> int:
    """Try damaged files until the time is over; the number of findings is 0 or 1."""
    target = TARGETS[name]
    seeds = target.seeds()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for data in seeds:
            target(data, folder)  # also imports what reading needs, before memory is limited
        limit_memory()
        tried, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            data = damaged(rng.choice(seeds), seeds, rng)
            try:
                if hasattr(signal, "SIGALRM"):
                    signal.alarm(PATIENCE)
                target(data, folder)
            except BaseException as error:
                signal.alarm(0)
                FINDINGS.joinpath(name).mkdir(parents=True, exist_ok=True)
                kept = FINDINGS / name / f"{type(error).__name__}-{seed}-{tried}.bin"
                kept.write_bytes(data)
                sys.stderr.write(f"{kept}: {type(error).__name__}: {error}\n")
                raise
            tried += 1
    sys.stdout.write(f"{name}: {tried} files, no finding\n")
    return 0


def limit_memory() -> None:
    """Let anything that takes more than the limit on top of what is in use fail with MemoryError."""
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
