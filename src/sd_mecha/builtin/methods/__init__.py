"""The built-in merge methods, one family per file. Importing this package registers them."""

from __future__ import annotations

from sd_mecha.builtin.methods import bounds, casting, exchange, linear, masks, select, spherical, ties

__all__ = ["bounds", "casting", "exchange", "linear", "masks", "select", "spherical", "ties"]
