from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sd_mecha
from tests.faults.support import write_model


@pytest.fixture
def a(tmp_path: Path) -> Path:
    """A small model file."""
    return write_model(tmp_path / "a.safetensors", w=torch.full((6, 4), 1.0), b=torch.full((4,), 1.0))


@pytest.fixture
def b(tmp_path: Path) -> Path:
    """Another one of the same shapes."""
    return write_model(tmp_path / "b.safetensors", w=torch.full((6, 4), 3.0), b=torch.full((4,), 3.0))


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that this process may not look into, in one that it may write to."""
    if not hasattr(os, "seteuid"):
        pytest.skip("no such permissions here")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "closed"
        path.mkdir()
        write_model(path / "model.safetensors", w=torch.ones(1))
        sd_mecha.merge(sd_mecha.model(path), output=path / "loaded.safetensors")  # all modules, that is
        path.parent.chmod(0o777)
        path.chmod(0)
        user = os.geteuid()
        if not user:
            os.seteuid(65534)  # root may look anywhere
        try:
            yield path
        finally:
            os.seteuid(user)
            path.chmod(0o700)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output path that leads to something already, in a folder that holds nothing else."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "out.safetensors"
    path.write_bytes(b"what was there before")
    return path
