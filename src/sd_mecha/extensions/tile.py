"""Where in its tensor a tile lies; tiled methods that declare **kwargs receive it as `tile`."""

from __future__ import annotations

import math
from dataclasses import dataclass

ALIGNMENT = 4096
"""Tiles start at multiples of this many elements."""

_PIECE = 1 << 17
_LARGEST_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements `start` to `stop` (flat, row-major) of a tensor of `numel` elements and that shape."""

    start: int
    stop: int
    numel: int
    shape: tuple[int, ...]


def piece_of(shape: tuple[int, ...]) -> int:
    """Elements of which methods with `tiling="pieces"` make a multiple at a time: whole rows, if they are not too long.

    What is computed piece by piece has the same bits for every range of pieces that is asked for.

    >>> piece_of((1280, 320)) // 320
    448
    """
    row = max(math.prod(shape[1:]), 1)
    unit = math.lcm(row, ALIGNMENT)
    return ALIGNMENT if unit > _LARGEST_PIECE else -(-_PIECE // unit) * unit
