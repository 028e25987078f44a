"""What other systems lack, and what this one may run out of."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import OutputError
from sd_mecha.storage.capabilities import capabilities
from tests.faults.support import many, only_file, read, refused, write_model


def digest(recipe: Any, path: Path, **options: Any) -> str:
    sd_mecha.merge(recipe, output=path, **options)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("lacking", [*sorted(vars(capabilities)), "everything"])
@pytest.mark.parametrize("threads", [0, 3])
def test_a_merge_without_a_system_call_gives_the_same_bytes(
    tmp_path: Path, lacking: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = many(tmp_path / "one.safetensors", 0.0), many(tmp_path / "other.safetensors", 2.0)
    broken = write_model(tmp_path / "nan.safetensors", **{**read(one), "k07": torch.full((1 << 14,), torch.nan)})
    recipe = sd_mecha.n_average(*map(sd_mecha.model, (one, other, broken)))  # a dropped tensor leaves a gap to close
    path = tmp_path / "out" / "out.safetensors"
    path.parent.mkdir()
    expected = digest(recipe, path)
    names = vars(capabilities) if lacking == "everything" else [lacking]
    for name in list(names):
        monkeypatch.setattr(capabilities, name, False)
    assert digest(recipe, path, threads=threads, total_buffer_size=1 << 16) == expected
    assert only_file(path)
    assert "k07" not in read(path)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no positional reads here")
def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = many(tmp_path / "one.safetensors", 0.0, 5), many(tmp_path / "other.safetensors", 2.0, 5)
    recipe = sd_mecha.n_average(sd_mecha.model(one), sd_mecha.model(other))
    expected = digest(recipe, tmp_path / "expected.safetensors")
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:1001]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:777], offset))
    assert digest(recipe, tmp_path / "out.safetensors") == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("noticed", ["reserving", "looking", "writing"])
def test_a_disk_that_is_really_full(
    tmp_path: Path, small_disk: Path, threads: int, noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = many(tmp_path / "one.safetensors", 0.0)
    old = write_model(small_disk / "old.safetensors", w=torch.ones(4))
    monkeypatch.setattr(capabilities, "fallocate", noticed == "reserving")
    if noticed == "writing":
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
    with refused(OutputError, OSError, says=[old, "No space left", "free some space"]):
        sd_mecha.merge(sd_mecha.model(one), output=old, threads=threads)
    assert read(old)["w"].tolist() == [1.0] * 4
    assert only_file(old)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_more_models_than_open_files_are_allowed(tmp_path: Path) -> None:
    for i in range(300):
        write_model(tmp_path / f"{i}.safetensors", w=torch.full((8,), float(i)))
    code = """
import resource, sys, sd_mecha
from pathlib import Path
folder = Path(sys.argv[1])
models = [sd_mecha.model(folder / f"{i}.safetensors") for i in range(300)]
sd_mecha.merge(models[0])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sd_mecha.merge(sd_mecha.n_average(*models), output=folder / "out.safetensors", threads=3, output_dtype="float32")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out.safetensors")["w"].tolist() == [149.5] * 8
