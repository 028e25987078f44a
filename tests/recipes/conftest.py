from __future__ import annotations

from collections.abc import Iterator

import pytest

from sd_mecha.recipes import provider
from tests.recipes.fakes import FakeProvider


@pytest.fixture(autouse=True)
def fakes() -> Iterator[FakeProvider]:
    """Install the fake provider for each test, and put back what was there."""
    fake = FakeProvider()
    previous = provider.install(fake)
    yield fake
    provider.install(previous)
