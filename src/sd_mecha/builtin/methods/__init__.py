"""The built-in merge methods, one family per file. Importing this package registers them."""

from __future__ import annotations

from sd_mecha.builtin.methods import (
    bounds,
    casting,
    cosine,
    dropout,
    exchange,
    fourier,
    geometric,
    kronecker,
    linear,
    masks,
    median,
    regions,
    rotation,
    select,
    spherical,
    stock,
    svd,
    ties,
)

__all__ = [
    "bounds",
    "casting",
    "cosine",
    "dropout",
    "exchange",
    "fourier",
    "geometric",
    "kronecker",
    "linear",
    "masks",
    "median",
    "regions",
    "rotation",
    "select",
    "spherical",
    "stock",
    "svd",
    "ties",
]
