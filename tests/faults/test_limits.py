"""Files that are large in one way or another: they work, or are refused at once."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sd_mecha
from sd_mecha.errors import FileFormatError
from tests.faults.support import read, refused, write_header, write_model


@pytest.mark.slow
def test_a_hundred_thousand_tensors_of_one_byte(tmp_path: Path) -> None:
    names = [f"blocks.{n}.flag" for n in range(100_000)]
    path = write_model(
        tmp_path / "many.safetensors",
        **{name: torch.tensor([n % 251], dtype=torch.uint8) for n, name in enumerate(names)},
    )
    out = tmp_path / "out.safetensors"
    sd_mecha.merge(sd_mecha.model(path), output=out, output_dtype=None, tqdm=None)
    found = read(out)
    assert [int(found[name]) for name in names] == [n % 251 for n in range(100_000)]


def test_a_sparse_file_of_ten_gigabytes_costs_what_is_read(tmp_path: Path) -> None:
    size = 10_000_000_000
    header = {
        "huge": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.seek(size, os.SEEK_CUR)
        file.write(struct.pack("<2f", 1.0, 3.0))
    other = write_model(tmp_path / "other.safetensors", small=torch.tensor([3.0, 5.0]))
    mean = sd_mecha.n_average(sd_mecha.model(path), sd_mecha.model(other))
    merged = sd_mecha.merge(mean, tqdm=None)
    assert merged is not None
    assert merged["small"].tolist() == [2.0, 4.0]


@pytest.mark.parametrize("power", [31, 53, 60, 63])
def test_a_tensor_that_claims_more_than_there_is(tmp_path: Path, power: int) -> None:
    entry = {"dtype": "U8", "shape": [2**power], "data_offsets": [0, 2**power]}
    path = write_header(tmp_path / "claims.safetensors", {"w": entry}, bytes(16))
    with refused(FileFormatError, ValueError, says=[path, "'w'", "truncated" if power < 63 else "expected"]):
        sd_mecha.merge(sd_mecha.model(path))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_thousand_models_with_256_descriptors(tmp_path: Path) -> None:
    for n in range(1000):
        write_model(tmp_path / f"{n}.safetensors", w=torch.full((4,), float(n)))
    code = """
import resource, sys, sd_mecha
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
folder = Path(sys.argv[1])
models = [sd_mecha.model(folder / f"{n}.safetensors") for n in range(1000)]
sd_mecha.merge(sd_mecha.n_average(*models), output=folder / "out.safetensors", output_dtype="float32", tqdm=None)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out.safetensors")["w"].tolist() == [499.5] * 4
