from __future__ import annotations

import pytest

from sd_mecha.storage.capabilities import capabilities


@pytest.fixture(params=["native", "portable"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with this system's calls, and with the portable code that Windows would take."""
    if request.param == "portable":
        for name in vars(capabilities):
            monkeypatch.setattr(capabilities, name, False)
    return request.param
