from __future__ import annotations

import pytest

from sd_mecha.extensions import registry


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as if all plugs were loaded, so that a registry holds only what the test puts in."""
    monkeypatch.setattr(registry, "_loaded", True)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as if no plug was loaded yet, with an empty package for the built-ins and no entry points."""
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "BUILTIN_PACKAGE", "json")
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [])
