from __future__ import annotations

from pathlib import Path

import pytest

from sd_mecha.storage.capabilities import capabilities


@pytest.fixture(params=["native", "portable"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with this system's calls, and with the portable code that Windows would take."""
    if request.param == "portable":
        for name in vars(capabilities):
            monkeypatch.setattr(capabilities, name, False)
    return request.param


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of a model that is there already."""
    folder = tmp_path / "model"
    (folder / "sub" / "empty").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"old")
    (folder / "model.safetensors").write_bytes(b"old weights")
    (folder / "notes.txt").write_bytes(b"mine")
    (folder / ".hidden").write_bytes(b"mine too")
    (folder / "sub" / "deep.txt").write_bytes(b"deep")
    (folder / "link").symlink_to("notes.txt")
    return folder


@pytest.fixture(params=[True, False], ids=["exchange", "renames"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step where the system can, and in several."""
    monkeypatch.setattr(capabilities, "exchange", request.param and capabilities.exchange)
