"""Built-in model configs; importing this package registers them and builds none."""

from __future__ import annotations

import importlib

for _name in ("singleton", "supermerger_blocks", "sd1"):
    importlib.import_module(f"{__name__}.{_name}")
