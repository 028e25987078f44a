from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
def old(tmp_path: Path) -> Path:
    """An output path that leads to something already, in a folder that holds nothing else."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "out.safetensors"
    path.write_bytes(b"what was there before")
    return path
