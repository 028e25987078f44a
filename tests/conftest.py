"""What holds for every test."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from sd_mecha.extensions import model_dirs

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background, programs ignore ctrl-C


@pytest.fixture(autouse=True)
def _own_model_dirs() -> Iterator[None]:
    """Directories that a test adds, through the command line for instance, are not searched in the next one."""
    before = model_dirs.get_all()
    yield
    for path in model_dirs.get_all():
        if path not in before:
            model_dirs.remove_path(path)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """What a command shows of the log, it shows for itself alone."""
    logger = logging.getLogger("sd_mecha")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
