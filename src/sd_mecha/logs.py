"""The library's log, for programs that have none of their own."""

from __future__ import annotations

import logging


def set_log_level(level: str | int = "INFO") -> None:
    """Show messages of the library from `level` on, on standard error unless a handler is set up already."""
    logger = logging.getLogger("sd_mecha")
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
